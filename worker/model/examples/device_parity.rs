//! One training step on a device against the same step on the CPU, in the same precision: logits, loss, gradients, the moved parameters and
//! the digest, in f32 and in bf16. Ends with 0 and `CHECK: as expected`, with 1 where something is off, with 77 where there
//! is no such device.
//!
//! `cargo run --release -p musher-model --example device_parity -- [cuda:0] [WIDTH] [IMAGE_SIZE] [BATCH]`

use std::process::ExitCode;

use musher_model::{Error, Mode, ModelOptions, Replica};
use tch::{Device, Kind, Tensor};

/// Relative, of the whole tensor.
const FP32: [f64; 3] = [1e-3; 3];
const BF16: [f64; 3] = [2e-2; 3];

fn main() -> Result<ExitCode, Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument =
        |index: usize, default: f64| arguments.get(index).and_then(|a| a.parse().ok()).unwrap_or(default);
    let device = match arguments.first().map(String::as_str).unwrap_or("cuda:0") {
        "cpu" => Device::Cpu,
        name => match torch_ext::open_cuda() {
            Ok(()) => Device::Cuda(name.trim_start_matches("cuda:").parse().unwrap_or(0)),
            Err(why) => {
                println!("skipped: {why}");
                return Ok(ExitCode::from(77));
            }
        },
    };
    let image_size = argument(2, 64.0) as usize;
    // Batch norms over few values magnify rounding a thousandfold, in PyTorch too: they would be all one sees.
    let freeze_batch_norm = true;
    let options =
        ModelOptions { width: argument(1, 0.5), image_size, freeze_batch_norm, ..ModelOptions::default() };
    let (size, batch) = (image_size as i64, argument(3, 8.0) as i64);
    tch::manual_seed(1);
    let images = Tensor::rand([batch, 3, size, size], (Kind::Float, Device::Cpu));
    let masks = Tensor::randint(3, [batch, size / 2, size / 2], (Kind::Int64, Device::Cpu));

    // libtorch lets convolutions round to TF32 unless it is told not to.
    torch_ext::allow_tf32(false)?;
    let mut fits = true;
    for (name, bf16, limits) in [("fp32", false, FP32), ("bf16", true, BF16)] {
        let expected = Step::take(&options, Device::Cpu, bf16, &images, &masks)?;
        let found = Step::take(&options, device, bf16, &images, &masks)?;
        let errors = [
            deviation(&found.logits, &expected.logits),
            (found.loss / expected.loss - 1.0).abs(),
            deviation(&found.gradient, &expected.gradient),
        ];
        let named = ["logits", "loss", "gradient"].into_iter().zip(errors).zip(limits);
        for ((what, error), limit) in named {
            println!("{name} {what:<9} deviates by {error:.1e}, at most {limit:.0e} allowed");
            fits &= error <= limit;
        }
        println!("{name} digest    {}", if found.digests_agree { "is that of the bytes" } else { "IS OFF" });
        fits &= found.digests_agree;
    }
    println!("CHECK: {}", if fits { "as expected" } else { "FAILED" });
    Ok(if fits { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Step {
    logits: Tensor,
    loss: f64,
    gradient: Tensor,
    digests_agree: bool,
}

impl Step {
    fn take(
        options: &ModelOptions,
        device: Device,
        bf16: bool,
        images: &Tensor,
        masks: &Tensor,
    ) -> Result<Self, Error> {
        let mut replica = Replica::new(options, 7, device)?;
        replica.use_bf16(bf16)?;
        replica.begin_step()?;
        let logits = replica.forward(&images.f_to_device(device)?, Mode::Train)?;
        let scale = 1.0 / masks.numel() as f64;
        let loss = replica.backward_sum_loss(&logits, &masks.f_to_device(device)?, scale)?;
        let gradient = replica.gradients().f_to_device(Device::Cpu)?.f_detach_copy()?;
        let applies = replica.measure_gradients(None)?.finite.f_to_kind(Kind::Float)?.f_view([1])?;
        replica.update(1e-3, &applies, None)?;
        replica.settle(applies.f_double_value(&[0])? == 1.0);
        let bytes = replica.read_state(0, replica.state_len() as usize)?;
        Ok(Self {
            logits: logits.f_detach()?.f_to_device(Device::Cpu)?,
            loss: loss.f_double_value(&[])?,
            gradient,
            digests_agree: replica.state_digest()? == musher_proto::digest::of_slice(0, &bytes),
        })
    }
}

/// Norm of the difference over the norm.
fn deviation(found: &Tensor, expected: &Tensor) -> f64 {
    let norm =
        |tensor: Tensor| tensor.to_kind(Kind::Double).square().sum(Kind::Double).sqrt().double_value(&[]);
    norm(found - expected) / norm(expected.shallow_clone())
}
