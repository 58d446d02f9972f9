//! What a job comes to, said before it runs: its steps and shards, the network's size, memory and disk. Pure.

use bytesize::ByteSize;
use musher_proto::{
    ids::Rank,
    job::JobConfig,
    shard::share,
    size::{NetworkSize, WorkerMemory},
};

/// What is known of the data set here.
#[derive(Clone, Debug)]
pub enum Samples {
    Known {
        train: u64,
        val: u64,
    },
    /// Why not.
    Unknown(String),
}

/// Lines for people, each a comment of TOML, so that what is printed stays a job.
pub fn outlook(job: &JobConfig, world: u32, samples: &Samples) -> String {
    let mut lines = vec![format!("What it comes to, for a team of {world}:")];
    lines.extend(shards(job, world, samples));
    lines.extend(sizes(job, world));
    lines.iter().map(|line| format!("# {line}\n")).collect()
}

fn shards(job: &JobConfig, world: u32, samples: &Samples) -> Vec<String> {
    let batch = u64::from(job.train.global_batch);
    let of_ranks = |size: u64| {
        let mut sizes: Vec<_> = (0..world).map(|rank| share(0..size, Rank(rank), world)).collect();
        sizes.sort_by_key(|share| share.end - share.start);
        let len = |share: Option<&std::ops::Range<u64>>| share.map_or(0, |share| share.end - share.start);
        (len(sizes.first()), len(sizes.last()))
    };
    let each = |size: u64| match of_ranks(size) {
        (least, most) if least == most => format!("{most} a rank"),
        (least, most) => format!("{least} or {most} a rank"),
    };
    let mut lines = Vec::new();
    match samples {
        Samples::Known { train, val } => {
            let (train, val) = (*train, *val);
            let (steps, units) = (train.div_ceil(batch), val.div_ceil(batch));
            lines.push(format!(
                "{train} training samples: {steps} steps an epoch, {} in {} epochs at most",
                steps * u64::from(job.train.epochs),
                job.train.epochs
            ));
            match (train / batch, train % batch) {
                (0, short) => lines.push(format!("a step has all {short}: {}", each(short))),
                (_, 0) => lines.push(format!("a step has {batch}: {}", each(batch))),
                (_, short) => lines.push(format!(
                    "a step has {batch}: {}; the last of an epoch has {short}: {}",
                    each(batch),
                    each(short)
                )),
            }
            lines.push(format!(
                "{val} validation samples: {units} units of up to {batch}, shared out by turns"
            ));
        }
        Samples::Unknown(why) => {
            lines.push(format!("a step has {batch}: {}; how many steps is not known: {why}", each(batch)));
        }
    }
    if u64::from(world) > batch {
        lines.push(format!(
            "{} ranks stand by in each step: there are more of them than samples in it (train.global_batch)",
            u64::from(world) - batch
        ));
    }
    lines
}

fn sizes(job: &JobConfig, world: u32) -> Vec<String> {
    let network = NetworkSize::of(job);
    let at_once = job.most_at_once(world);
    let memory = WorkerMemory::new(&network, at_once);
    let trains = match network.trainable {
        all if all == network.parameters => "all train".to_owned(),
        some => format!("{} of them train", grouped(some)),
    };
    let kept = u64::from(job.checkpoint.keep) + 1;
    vec![
        format!("network: {} parameters, {trains}", grouped(network.parameters)),
        format!(
            "checkpoint: {} of state, {} more where it brings the best weights; up to {} kept: {}",
            bytes(network.state_bytes),
            bytes(network.weights_bytes),
            kept,
            bytes(kept * network.state_bytes + network.weights_bytes),
        ),
        format!(
            "memory of a worker, on its device, estimated: {} = parameters {} + gradients {} + Adam's moments {} + \
             activations of {at_once} x {} (outputs of convolutions and batch norms); the libraries' workspace comes \
             on top",
            bytes(memory.total()),
            bytes(memory.parameters),
            bytes(memory.gradients),
            bytes(memory.moments),
            bytes(network.activation_bytes),
        ),
        format!(
            "decoded images: up to {} MiB of memory a worker (data.cache_mb), and {} MiB on a device that augments \
             (data.device_cache_mb)",
            job.data.cache_mb, job.data.device_cache_mb
        ),
    ]
}

fn bytes(count: u64) -> String {
    ByteSize::b(count).display().si().to_string()
}

/// In groups of three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(" ")
}

#[cfg(test)]
mod tests {
    use musher_proto::job;

    use super::*;

    fn told(overrides: &[&str], world: u32, train: u64, val: u64) -> String {
        let overrides: Vec<_> = overrides.iter().map(|&it| it.to_owned()).collect();
        let job = job::load("", "test", &overrides).expect("it is a job");
        outlook(&job, world, &Samples::Known { train, val })
    }

    #[track_caller]
    fn says(text: &str, parts: &[&str]) {
        for part in parts {
            assert!(text.contains(part), "no \"{part}\" in:\n{text}");
        }
    }

    #[test]
    fn steps_and_shares_are_those_of_a_run() {
        let text = told(&["train.global_batch=8", "train.epochs=30"], 3, 237, 240);
        says(&text, &["237 training samples: 30 steps an epoch, 900 in 30 epochs"]);
        says(&text, &["a step has 8: 2 or 3 a rank; the last of an epoch has 5: 1 or 2 a rank"]);
        says(&text, &["240 validation samples: 30 units"]);
        assert!(!text.contains("stand by"), "{text}");
        says(
            &told(&["train.global_batch=8"], 2, 40, 12),
            &["a step has 8: 4 a rank\n", "12 validation samples: 2 units"],
        );
        says(
            &told(&["train.global_batch=8"], 10, 40, 12),
            &["2 ranks stand by in each step", "0 or 1 a rank"],
        );
        says(
            &told(&["train.global_batch=64"], 2, 40, 12),
            &["a step has all 40: 20 a rank", "1 steps an epoch"],
        );
    }

    #[test]
    fn the_article_s_network_is_as_large_as_it_is() {
        let text = told(&["train.global_batch=32"], 2, 3680, 3669);
        says(&text, &["63 564 867 parameters, all train", "checkpoint: 763.0 MB of state", "254.5 MB more"]);
        says(
            &text,
            &["parameters 254.3 MB + gradients 254.3 MB + Adam's moments 508.5 MB", "activations of 16 x"],
        );
        let frozen = told(&["model.freeze_encoder=true", "train.micro_batch=4"], 2, 3680, 3669);
        says(&frozen, &["of them train", "activations of 4 x"]);
    }

    #[test]
    fn what_is_printed_stays_a_job() {
        let job = job::load("", "test", &[]).expect("it is a job");
        let printed =
            format!("{}{}", job.to_toml(), outlook(&job, 2, &Samples::Unknown("it is elsewhere".into())));
        assert_eq!(job::load(&printed, "test", &[]).expect("it is a job"), job);
    }
}
