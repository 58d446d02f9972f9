//! What a replica promises beyond the network's arithmetic: flat views, buckets, state, frozen parts, pooling.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::sync::mpsc;
use std::thread;

use musher_model::{Encoder, Error, Manner, Mode, ModelOptions, Replica};
use musher_weights::WeightsFile;
use safetensors::{SafeTensors, serialize};
use tch::{Device, Kind, Tensor};

fn small() -> ModelOptions {
    ModelOptions { width: 0.05, image_size: 32, ..ModelOptions::default() }
}

fn replica_of(options: &ModelOptions) -> Replica {
    tch::set_num_threads(1);
    Replica::new(options, 5, Device::Cpu).unwrap()
}

/// Images and masks that are a function of `seed`.
fn batch(options: &ModelOptions, seed: i64) -> (Tensor, Tensor) {
    let (n, size) = (2, options.image_size as i64);
    let noise = |len: i64, step: f64| (Tensor::arange(len, (Kind::Double, Device::Cpu)) * step + seed).sin();
    let images =
        (noise(n * 3 * size * size, 12.9898) * 0.5 + 0.5).to_kind(Kind::Float).view([n, 3, size, size]);
    let masks = (noise(n * size * size / 4, 78.233) * 1.49 + 1.5).to_kind(Kind::Int64);
    (images, masks.view([n, size / 2, size / 2]))
}

fn accumulate(replica: &mut Replica, seed: i64) -> f64 {
    try_accumulate(replica, seed, |_| ()).unwrap()
}

/// `ready` hears of the buckets.
fn try_accumulate(
    replica: &mut Replica,
    seed: i64,
    ready: impl FnMut(usize) + Send + 'static,
) -> Result<f64, Error> {
    let (images, masks) = batch(replica.options(), seed);
    replica.begin_step()?;
    replica.zero_gradients()?;
    let logits = replica.forward(&images, Mode::Train)?;
    let loss = replica.backward_last(&logits, &masks, 1.0 / masks.numel() as f64, ready)?;
    Ok(loss.double_value(&[]))
}

fn update(replica: &mut Replica, learning_rate: f64, applies: bool) {
    let on_device = Tensor::full([1], f64::from(u8::from(applies)), (Kind::Float, replica.device()));
    replica.update(learning_rate, &on_device, None).unwrap();
    replica.settle(applies);
}

fn step(replica: &mut Replica, seed: i64) -> f64 {
    let loss = accumulate(replica, seed);
    update(replica, 1e-3, true);
    loss
}

fn train(replica: &mut Replica, seeds: impl IntoIterator<Item = i64>) {
    for seed in seeds {
        step(replica, seed);
    }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.detach().contiguous().view(-1)).unwrap()
}

/// The exported tensors' bytes by name.
fn weights(replica: &Replica) -> HashMap<String, Vec<u8>> {
    let file = replica.weights_safetensors(&BTreeMap::new()).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    file.iter().map(|(name, view)| (name.into(), view.data().to_vec())).collect()
}

#[test]
fn full_networks_have_the_known_parameter_counts() {
    for (width, encoder, expected) in [
        (1.0, Encoder::Torchvision, 63_564_867),
        (0.25, Encoder::Torchvision, 3_987_987),
        (0.25, Encoder::Keras, 3_994_627),
    ] {
        let options = ModelOptions { width, encoder, ..ModelOptions::default() };
        assert_eq!(replica_of(&options).parameter_count(), expected);
    }
}

#[test]
fn impossible_options_and_inputs_are_errors() {
    for options in [
        ModelOptions { classes: 1, ..small() },
        ModelOptions { width: f64::NAN, ..small() },
        ModelOptions { image_size: 48, ..small() },
    ] {
        assert!(matches!(Replica::new(&options, 0, Device::Cpu), Err(Error::Options(_))));
    }
    let replica = replica_of(&small());
    let images = Tensor::zeros([2, 3, 64, 64], (Kind::Float, Device::Cpu));
    assert!(matches!(replica.forward(&images, Mode::Eval), Err(Error::Shape { .. })));
    let one = Tensor::zeros([1, 3, 32, 32], (Kind::Float, Device::Cpu));
    assert!(matches!(replica.forward(&one, Mode::Train), Err(Error::TooFewValues { .. })));
    assert!(replica.forward(&one, Mode::Eval).is_ok());
}

#[test]
fn parameters_and_gradients_are_views_of_the_flat_buffers() {
    let mut replica = replica_of(&small());
    accumulate(&mut replica, 1);
    let flat = replica.gradients().data_ptr() as usize;
    let bytes = replica.gradients().numel() * 4;
    for (name, parameter) in replica.parameters() {
        let gradient = parameter.grad();
        assert_eq!(parameter.stride(), gradient.stride(), "{name}");
        let address = gradient.data_ptr() as usize;
        assert!(address.is_multiple_of(64) && (flat..flat + bytes).contains(&address), "{name}");
    }
    replica.with_gradients_mut(|flat| flat.fill(2.0)).unwrap();
    update(&mut replica, 0.5, true);
    assert!(replica.parameters().all(|(_, parameter)| values(&parameter.grad()).iter().all(|&g| g == 2.0)));
    let head = replica.parameters().find(|(name, _)| *name == "head.bias").unwrap().1;
    assert!(
        values(head).iter().all(|&bias| (bias + 0.5).abs() < 1e-5),
        "Adam moved the network's own tensor"
    );
}

#[test]
fn the_same_seed_gives_the_same_bits_on_any_thread() {
    let run = || {
        let mut replica = replica_of(&small());
        train(&mut replica, 0..3);
        replica.state_digest().unwrap()
    };
    let expected = run();
    let threads: Vec<_> = (0..3).map(|_| thread::spawn(run)).collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), expected);
    }
    let other = Replica::new(&small(), 6, Device::Cpu).unwrap();
    assert_ne!(
        other.state_digest().unwrap(),
        Replica::new(&small(), 5, Device::Cpu).unwrap().state_digest().unwrap()
    );
}

#[test]
fn a_replica_moves_between_threads() {
    let mut replica = replica_of(&small());
    let loss = thread::spawn(move || step(&mut replica, 1)).join().unwrap();
    assert!(loss > 0.0);
}

#[test]
fn a_panicking_report_fails_its_pass_and_the_next_is_whole() {
    let mut replica = replica_of(&small());
    let error = try_accumulate(&mut replica, 1, |_| panic!("as the test wants it")).unwrap_err();
    assert!(error.to_string().contains("a gradient hook panicked"), "{error}");
    step(&mut replica, 1);
    let mut undisturbed = replica_of(&small());
    step(&mut undisturbed, 1);
    assert_eq!(replica.state_digest().unwrap(), undisturbed.state_digest().unwrap());
}

#[test]
fn training_learns() {
    let mut replica = replica_of(&small());
    let first = step(&mut replica, 3);
    let last = (0..25).map(|_| step(&mut replica, 3)).last().unwrap();
    assert!(last < 0.85 * first, "{first} to {last}");
}

#[test]
fn an_unapplied_step_leaves_no_trace() {
    let mut replica = replica_of(&small());
    step(&mut replica, 1);
    let before = replica.state_digest().unwrap();
    accumulate(&mut replica, 2);
    update(&mut replica, 1e-3, false);
    assert_eq!((replica.state_digest().unwrap(), replica.adam_steps()), (before, 1));

    let mut undisturbed = replica_of(&small());
    step(&mut undisturbed, 1);
    step(&mut undisturbed, 3);
    step(&mut replica, 3);
    assert_eq!(replica.state_digest().unwrap(), undisturbed.state_digest().unwrap());
}

#[test]
fn micro_batches_add_up() {
    let mut replica = replica_of(&ModelOptions { freeze_batch_norm: true, ..small() });
    let ((a, mask_a), (b, mask_b)) = (batch(&small(), 1), batch(&small(), 2));
    let mut pass = |batches: &[(Tensor, Tensor)]| {
        replica.zero_gradients().unwrap();
        for (images, masks) in batches {
            let logits = replica.forward(images, Mode::Train).unwrap();
            let _ = replica.backward_sum_loss(&logits, masks, 1e-3).unwrap();
        }
        values(replica.gradients())
    };
    let whole = pass(&[(Tensor::cat(&[&a, &b], 0), Tensor::cat(&[&mask_a, &mask_b], 0))]);
    let parts = pass(&[(a, mask_a), (b, mask_b)]);
    let largest = whole.iter().fold(0f32, |max, value| max.max(value.abs()));
    assert!(whole.iter().zip(&parts).all(|(whole, part)| (whole - part).abs() < 1e-4 * largest));
}

#[test]
fn buckets_cover_the_gradient_and_are_complete_when_reported() {
    let mut replica = replica_of(&small());
    replica.plan_buckets(20_000).unwrap();
    let buckets = replica.buckets().to_vec();
    assert!(buckets.len() > 5, "{} buckets", buckets.len());
    assert_eq!((buckets[0].range.start, buckets.last().unwrap().range.end), (0, replica.gradients().numel()));

    // Each bucket's values at the moment of its report, copied from its view.
    for _ in 0..2 {
        let views = replica.bucket_gradients().unwrap();
        let (sender, reports) = mpsc::channel();
        let ready = move |bucket: usize| sender.send((bucket, values(&views[bucket]))).unwrap();
        try_accumulate(&mut replica, 1, ready).unwrap();
        let flat = values(replica.gradients());
        // Ends, as the report is gone with its pass.
        let reported: Vec<_> = reports.iter().collect();
        assert!(reported.iter().map(|(bucket, _)| *bucket).eq(0..buckets.len()));
        for (bucket, at_report) in reported {
            assert_eq!(
                at_report,
                flat[buckets[bucket].range.clone()],
                "bucket {bucket} changed after its report"
            );
        }
    }
}

/// As a recorded backward pass shows, so no bucket is held back by a later one, and the order of the exchange follows
/// from the model alone. A layer's weight and bias may change places.
#[test]
fn gradients_lie_in_the_order_of_the_backward_pass() {
    for encoder in [Encoder::Torchvision, Encoder::Keras] {
        for freeze_encoder in [false, true] {
            let mut replica = replica_of(&ModelOptions { encoder, freeze_encoder, ..small() });
            let (sender, completed) = mpsc::channel();
            let trainable = || replica.parameters().filter(|(_, parameter)| parameter.requires_grad());
            for (_, parameter) in trainable() {
                let (address, sender) = (parameter.grad().data_ptr() as usize, sender.clone());
                torch_ext::on_gradient_accumulated(parameter, move || sender.send(address).unwrap()).unwrap();
            }
            let mut lie: Vec<_> = trainable().map(|(_, p)| p.grad().data_ptr() as usize).collect();
            lie.sort_unstable();
            accumulate(&mut replica, 1);
            let completed: Vec<_> = completed.try_iter().collect();
            assert_eq!(completed.len(), lie.len());
            for (turn, address) in completed.iter().enumerate() {
                let place = lie.binary_search(address).unwrap();
                assert!(place.abs_diff(turn) <= 1, "{encoder:?}: gradient {place} came as number {turn}");
            }
        }
    }
}

#[test]
fn state_round_trips_in_any_pieces() {
    let (mut donor, mut newcomer) = (replica_of(&small()), Replica::new(&small(), 99, Device::Cpu).unwrap());
    step(&mut donor, 1);
    donor.set_counters([1, 2, 3, 4, 5, 6, 7, u64::MAX]);
    let (len, digest) = (donor.state_len(), donor.state_digest().unwrap());

    let mut staging = newcomer.staging();
    let untouched = newcomer.state_digest().unwrap();
    let mut offset = 0;
    while offset < len {
        let piece = 100_003.min(len - offset) as usize;
        staging.receive(&donor.read_state(offset, piece).unwrap()).unwrap();
        offset += piece as u64;
    }
    assert!(staging.is_complete() && staging.digest() == digest);
    assert_eq!(newcomer.state_digest().unwrap(), untouched, "staging changes nothing");
    newcomer.adopt(staging).unwrap();
    assert_eq!(newcomer.state_digest().unwrap(), digest);
    assert_eq!((newcomer.counters(), newcomer.adam_steps()), (donor.counters(), 1));

    step(&mut donor, 2);
    step(&mut newcomer, 2);
    assert_eq!(newcomer.state_digest().unwrap(), donor.state_digest().unwrap());
}

#[test]
fn the_digest_adds_up_over_slices() {
    let mut replica = replica_of(&small());
    step(&mut replica, 1);
    let (len, whole) = (replica.state_len(), replica.state_digest().unwrap());
    assert_eq!(musher_proto::digest::of_slice(0, &replica.read_state(0, len as usize).unwrap()), whole);
    let layout = replica.state_layout();
    let cuts = [0, 4096, layout.parameters.end + 40, layout.batch_norm.start, layout.counters.start + 8, len];
    let parts = cuts.windows(2).map(|cut| replica.digest_of(cut[0]..cut[1]).unwrap());
    assert_eq!(parts.fold(0u64, u64::wrapping_add), whole);
}

#[test]
fn torn_and_foreign_states_are_refused_whole() {
    let mut replica = replica_of(&small());
    let before = replica.state_digest().unwrap();
    let mut staging = replica.staging();
    staging.receive(&[1; 100]).unwrap();
    assert!(matches!(replica.adopt(staging), Err(Error::StateLength { found: 100, .. })));
    let mut staging = replica.staging();
    assert!(staging.receive(&vec![0; replica.state_len() as usize + 1]).is_err());
    assert!(replica.load_state(&[0; 8]).is_err());
    assert!(replica.read_state(replica.state_len() - 4, 5).is_err());
    assert!(replica.read_state(u64::MAX, 1).is_err());
    assert_eq!(replica.state_digest().unwrap(), before);
}

#[test]
fn a_frozen_encoder_stays_as_it_is() {
    let mut replica = replica_of(&ModelOptions { freeze_encoder: true, ..small() });
    let before = weights(&replica);
    train(&mut replica, 0..3);
    let decoder = |name: &str| name.starts_with("decoder.") || name.starts_with("head.");
    for (name, after) in weights(&replica) {
        assert_eq!(before[&name] == after, !decoder(&name), "{name}");
    }
    assert!(replica.gradients().numel() < replica.parameter_count());
    let pooled = replica.pooled_moments(7).unwrap();
    replica.set_pooled(&pooled, 2).unwrap();
    for (name, after) in weights(&replica).into_iter().filter(|(name, _)| !decoder(name)) {
        assert_eq!(before[&name], after, "{name}");
    }
}

#[test]
fn frozen_batch_norm_trains_its_parameters_alone() {
    let options = ModelOptions { freeze_batch_norm: true, ..small() };
    let mut replica = replica_of(&options);
    let (images, _) = batch(&options, 1);
    let in_mode = |mode| values(&replica.forward(&images, mode).unwrap());
    assert_eq!(in_mode(Mode::Train), in_mode(Mode::Eval));
    let before = weights(&replica);
    step(&mut replica, 1);
    for (name, after) in weights(&replica) {
        assert_eq!(before[&name] == after, name.contains(".running_"), "{name}");
    }
}

#[test]
fn pooled_statistics_are_those_of_the_mixture() {
    let mut replicas = [replica_of(&small()), replica_of(&small())];
    let samples = [30u64, 10];
    for (seed, replica) in replicas.iter_mut().enumerate() {
        train(replica, 0..=seed as i64);
    }
    let before = replicas.each_ref().map(weights);
    let parts: Vec<_> = replicas.iter().zip(samples).map(|(r, n)| r.pooled_moments(n).unwrap()).collect();
    let sums: Vec<_> = parts[0].iter().zip(&parts[1]).map(|(a, b)| a + b).collect();
    for replica in &mut replicas {
        replica.set_pooled(&sums, 2).unwrap();
    }
    let floats = |bytes: &[u8]| -> Vec<f64> {
        bytes.as_chunks::<4>().0.iter().map(|&word| f32::from_le_bytes(word).into()).collect()
    };
    let (after, [left, right]) = (weights(&replicas[0]), before);
    for (name, mean) in after.iter().filter(|(name, _)| name.ends_with(".running_mean")) {
        let var_name = name.replace("_mean", "_var");
        let (means, vars) = ([&left[name], &right[name]], [&left[&var_name], &right[&var_name]]);
        let (means, vars) = (means.map(|m| floats(m)), vars.map(|v| floats(v)));
        for (channel, (mean, var)) in floats(mean).into_iter().zip(floats(&after[&var_name])).enumerate() {
            let weighted = |f: &dyn Fn(usize) -> f64| 0.75 * f(0) + 0.25 * f(1);
            let expected = weighted(&|r| means[r][channel]);
            let expected_var = weighted(&|r| vars[r][channel] + (means[r][channel] - expected).powi(2));
            assert!((mean - expected).abs() < 1e-6, "{name} {channel}");
            assert!((var / expected_var - 1.0).abs() < 1e-5, "{var_name} {channel}");
        }
    }
    assert_eq!(
        after,
        weights(&replicas[1])
            .into_iter()
            .map(|(name, bytes)| {
                let own = if name.contains(".running_") { bytes } else { after[&name].clone() };
                (name, own)
            })
            .collect()
    );
}

#[test]
fn pooling_alone_or_without_samples_changes_no_bit() {
    let mut replica = replica_of(&small());
    step(&mut replica, 1);
    let before = replica.state_digest().unwrap();
    replica.set_pooled(&replica.pooled_moments(32).unwrap(), 1).unwrap();
    replica.set_pooled(&replica.pooled_moments(0).unwrap(), 2).unwrap();
    assert_eq!(replica.state_digest().unwrap(), before);
    assert!(matches!(replica.set_pooled(&[1.0], 2), Err(Error::PooledLength { .. })));
}

#[test]
fn unfit_weights_are_named_and_change_nothing() {
    let mut replica = replica_of(&small());
    let before = replica.state_digest().unwrap();
    let file = replica.weights_safetensors(&BTreeMap::new()).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let refused = |replica: &mut Replica, file: Vec<u8>| replica.load_weights(&file).unwrap_err().to_string();

    let missing = serialize(tensors.iter().filter(|(name, _)| *name != "bn1.running_var"), None).unwrap();
    assert!(refused(&mut replica, missing).contains("bn1.running_var [3] is missing"));
    let surplus = tensors.iter().chain([("fc.bias", tensors.tensor("head.bias").unwrap())]);
    let surplus = serialize(surplus, None).unwrap();
    assert!(refused(&mut replica, surplus.clone()).contains("fc.bias [3] is not part of it"));
    let other =
        replica_of(&ModelOptions { classes: 5, ..small() }).weights_safetensors(&BTreeMap::new()).unwrap();
    assert!(refused(&mut replica, other).contains("head.bias has shape [5], not [3]"));
    assert!(refused(&mut replica, b"not a weights file".to_vec()).contains("safetensors"));
    assert_eq!(replica.state_digest().unwrap(), before);

    let mut surplus = WeightsFile::new(Cursor::new(surplus)).unwrap();
    let ignored = replica.load_encoder_weights(&mut surplus).unwrap();
    assert_eq!(ignored, ["decoder.* (72)", "fc.* (1)", "head.* (2)"]);
    assert_eq!(replica.state_digest().unwrap(), before, "its own encoder came back");
}

#[test]
fn clipping_brings_the_norm_down() {
    let mut replica = replica_of(&small());
    accumulate(&mut replica, 1);
    let norm = |replica: &Replica| replica.gradient_norm().unwrap().double_value(&[]);
    let before = norm(&replica);
    assert!(before.is_finite() && before > 0.0);
    let measure = replica.measure_gradients(Some(before / 4.0)).unwrap();
    assert_eq!(measure.finite.double_value(&[]), 1.0);
    let applies = Tensor::ones([1], (Kind::Float, Device::Cpu));
    replica.update(1e-3, &applies, measure.scale.as_ref()).unwrap();
    assert!((norm(&replica) * 4.0 / before - 1.0).abs() < 1e-5, "the update divided it in place");
    replica.with_gradients_mut(|flat| flat[17] = f32::NAN).unwrap();
    assert_eq!(replica.measure_gradients(None).unwrap().finite.double_value(&[]), 0.0);
}

/// What a GPU's replica does, on the CPU: gradients that are gathered by buckets, channels-last, are those that are made
/// in their places.
#[test]
fn gradients_that_are_gathered_are_those_made_in_place() {
    let options = ModelOptions { freeze_batch_norm: true, ..small() };
    let mut gathered = Replica::computing(&options, 5, Device::Cpu, Manner::Device).unwrap();
    let mut in_place = replica_of(&options);
    gathered.plan_buckets(20_000).unwrap();
    let largest = |gradient: &[f32]| gradient.iter().fold(0f32, |max, value| max.max(value.abs()));
    let agree = |gathered: &Replica, in_place: &Replica| {
        let (found, expected) = (values(gathered.gradients()), values(in_place.gradients()));
        let most = largest(&expected);
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4 * most));
    };
    // Twice, as a step's gradient replaces the one before.
    for seed in [1, 2] {
        let views = gathered.bucket_gradients().unwrap();
        let (sender, reports) = mpsc::channel();
        let ready = move |bucket: usize| sender.send((bucket, values(&views[bucket]))).unwrap();
        let loss = try_accumulate(&mut gathered, seed, ready).unwrap();
        assert!((loss / accumulate(&mut in_place, seed) - 1.0).abs() < 1e-5);
        agree(&gathered, &in_place);
        let flat = values(gathered.gradients());
        let reported: Vec<_> = reports.iter().collect();
        assert!(reported.iter().map(|(bucket, _)| *bucket).eq(0..gathered.buckets().len()));
        for (bucket, at_report) in reported {
            assert_eq!(at_report, flat[gathered.buckets()[bucket].range.clone()], "bucket {bucket}");
        }
    }
    // Micro-batches add up.
    for replica in [&mut gathered, &mut in_place] {
        replica.zero_gradients().unwrap();
        for seed in [1, 2] {
            let (images, masks) = batch(&options, seed);
            let logits = replica.forward(&images, Mode::Train).unwrap();
            let _ = replica.backward_sum_loss(&logits, &masks, 1e-3).unwrap();
        }
    }
    agree(&gathered, &in_place);
    for replica in [&mut gathered, &mut in_place] {
        replica.zero_gradients().unwrap();
        assert_eq!(largest(&values(replica.gradients())), 0.0, "a rank without samples");
        // A pass through the encoder alone, as for another task.
        let (images, _) = batch(&options, 3);
        let features = replica.encode(&images, Mode::Train).unwrap()[4].shallow_clone();
        replica.backward_sum(&features.square().mean(Kind::Float)).unwrap();
        assert!(largest(&values(replica.gradients())) > 0.0);
    }
    agree(&gathered, &in_place);
}

#[test]
fn a_pass_that_fails_leaves_nothing_to_the_next() {
    let compute = |fails: bool| {
        let mut replica = Replica::computing(&small(), 5, Device::Cpu, Manner::Device).unwrap();
        if fails {
            try_accumulate(&mut replica, 1, |_| panic!("a report that fails")).unwrap_err();
        }
        accumulate(&mut replica, 2);
        values(replica.gradients())
    };
    assert_eq!(compute(true), compute(false));
}

/// Rounding all weights at once changes no bit of what autocast does one by one.
#[test]
fn weights_rounded_together_are_those_that_autocast_rounds() {
    let step = |replica: &mut Replica, autocast: bool| {
        replica.zero_gradients().unwrap();
        let (images, masks) = batch(&small(), 1);
        replica.begin_step().unwrap();
        let forward = || replica.forward(&images, Mode::Train).unwrap().to_kind(Kind::Float);
        let logits = match autocast {
            true => torch_ext::autocast_bf16(Device::Cpu, forward).unwrap(),
            false => forward(),
        };
        let loss = replica.backward_sum_loss(&logits, &masks, 1e-3).unwrap().double_value(&[]);
        (loss, values(&logits), values(replica.gradients()))
    };
    let device_like = || Replica::computing(&small(), 5, Device::Cpu, Manner::Device).unwrap();
    let (mut together, mut each) = (device_like(), device_like());
    together.use_bf16(true).unwrap();
    let by_autocast = step(&mut each, true);
    assert_eq!(step(&mut together, false), by_autocast);
    // Of the parameters as they are now, not as they were.
    update(&mut together, 1e-2, true);
    update(&mut each, 1e-2, true);
    assert_eq!(step(&mut together, false), step(&mut each, true));
    assert_ne!(by_autocast, step(&mut device_like(), false), "it is another precision");
}

/// bf16 has 8 bits of mantissa; what the step comes to is that of f32 but for its rounding.
#[test]
fn bf16_gives_nearly_the_same_step() {
    let step = |bf16: bool| {
        let mut replica = replica_of(&ModelOptions { freeze_batch_norm: true, ..small() });
        replica.use_bf16(bf16).unwrap();
        let (images, _) = batch(replica.options(), 1);
        let logits = replica.forward(&images, Mode::Train).unwrap();
        assert_eq!(logits.kind(), Kind::Float);
        let loss = accumulate(&mut replica, 1);
        let evaluated = replica.forward(&images, Mode::Eval).unwrap();
        (loss, values(replica.gradients()), values(&logits), values(&evaluated))
    };
    let ((loss, gradient, logits, evaluated), (rounded_loss, rounded, rounded_logits, rounded_evaluated)) =
        (step(false), step(true));
    assert!((rounded_loss / loss - 1.0).abs() < 2e-2, "{rounded_loss} {loss}");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = dot(&gradient, &rounded) / (dot(&gradient, &gradient) * dot(&rounded, &rounded)).sqrt();
    assert!(cosine > 0.99, "{cosine}");
    assert_ne!(logits, rounded_logits, "it was computed in another precision");
    assert_eq!(evaluated, rounded_evaluated, "evaluation is not");
}
