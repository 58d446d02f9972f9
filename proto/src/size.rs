//! How large a job's network is: its parameters, its state in bytes, what a pass keeps for its way back. Counted from
//! the job alone, so that it can be said before anything runs; the network itself is `musher-model`'s, whose tests
//! hold these figures to it.

use crate::job::{Device, EncoderVariant, JobConfig, Precision};

/// Each tensor of a state begins at a multiple of so many f32.
const ALIGNMENT: u64 = 16;
/// Adam's step count and eight counters.
const COUNTER_BYTES: u64 = 72;
const F32: u64 = 4;
/// A bottleneck's output channels over its inner ones.
const EXPANSION: u64 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkSize {
    pub parameters: u64,
    /// Those of them that train.
    pub trainable: u64,
    /// What a checkpoint holds: parameters, both moments of what trains, batch norm's statistics, counters.
    pub state_bytes: u64,
    /// What a weights file holds, but for its head: parameters and batch norm's statistics.
    pub weights_bytes: u64,
    /// For one sample: what the forward pass keeps for the backward pass.
    pub activation_bytes: u64,
}

/// What a worker keeps in its device's memory, or in the machine's where it computes on the CPU. An estimate: libraries
/// take workspace besides, and allocators round up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerMemory {
    pub parameters: u64,
    pub gradients: u64,
    pub moments: u64,
    /// Of as many samples as are computed at once.
    pub activations: u64,
}

impl WorkerMemory {
    /// `samples` are computed at once.
    pub fn new(network: &NetworkSize, samples: u64) -> Self {
        Self {
            parameters: network.parameters * F32,
            gradients: network.trainable * F32,
            moments: 2 * network.trainable * F32,
            activations: network.activation_bytes * samples,
        }
    }

    pub fn total(&self) -> u64 {
        self.parameters + self.gradients + self.moments + self.activations
    }
}

impl NetworkSize {
    pub fn of(job: &JobConfig) -> Self {
        let keras = job.encoder() == EncoderVariant::Keras;
        let mut count = Count { bias: keras, trains: !job.model.freeze_encoder, ..Count::default() };
        let side = u64::from(job.data.image_size);
        let w = |channels| count_channels(channels, job.model.width);

        count.kept(3, side);
        count.conv(3, w(64), 7, side / 2);
        count.batch_norm(w(64), side / 2);
        // The pool's output, and for each value of it an index of eight bytes.
        count.kept(3 * w(64), side / 4);
        let mut inputs = w(64);
        for (channels, blocks, side) in
            [(64, 3, side / 4), (128, 4, side / 8), (256, 6, side / 16), (512, 3, side / 32)]
        {
            let (inner, outputs) = (w(channels), w(channels) * EXPANSION);
            for block in 0..blocks {
                let begins_a_stage = block == 0 && channels != 64;
                // Where the stride is: Keras has it in the first convolution, torchvision in the second.
                let first = if begins_a_stage && !keras { 2 * side } else { side };
                for (from, to, kernel, side) in
                    [(inputs, inner, 1, first), (inner, inner, 3, side), (inner, outputs, 1, side)]
                {
                    count.conv(from, to, kernel, side);
                    count.batch_norm(to, side);
                }
                if begins_a_stage || inputs != outputs {
                    count.conv(inputs, outputs, 1, side);
                    count.batch_norm(outputs, side);
                }
                inputs = outputs;
            }
        }

        (count.bias, count.trains) = (true, true);
        let skips = [w(256) * EXPANSION, w(128) * EXPANSION, w(64) * EXPANSION, w(64)];
        let outputs = [w(1024), w(512), w(256), w(64)];
        for (stage, (skip, outputs)) in skips.into_iter().zip(outputs).enumerate() {
            let side = side / (16 >> stage);
            count.conv(inputs, outputs, 1, side);
            count.batch_norm(outputs, side);
            count.kept(outputs + skip, side);
            for inputs in [outputs + skip, outputs] {
                count.conv(inputs, outputs, 3, side);
                count.batch_norm(outputs, side);
            }
            inputs = outputs;
        }
        count.conv(inputs, u64::from(job.model.classes), 3, side / 2);
        // Their log-probabilities, in full precision.
        let logits = u64::from(job.model.classes) * (side / 2).pow(2) * F32;

        // On the CPU it is factors alone that are rounded, not what lies between the layers.
        let value = match (job.train.precision, job.cluster.device) {
            (Precision::Bf16, Device::Auto | Device::Cuda) => 2,
            (Precision::Bf16, Device::Cpu) | (Precision::Fp32 | Precision::Tf32, _) => F32,
        };
        let Count { parameters, trainable, flat, flat_trainable, flat_channels, kept, .. } = count;
        Self {
            parameters,
            trainable,
            state_bytes: F32 * (flat + 2 * flat_trainable + 2 * flat_channels) + COUNTER_BYTES,
            weights_bytes: F32 * (parameters + 2 * count.channels),
            activation_bytes: kept * value + logits,
        }
    }
}

/// `channels` of the full network, scaled, halves to even.
fn count_channels(channels: u64, width: f64) -> u64 {
    ((channels as f64 * width).round_ties_even() as u64).max(1)
}

#[derive(Default)]
struct Count {
    /// Of convolutions.
    bias: bool,
    trains: bool,
    parameters: u64,
    trainable: u64,
    /// Of batch norms.
    channels: u64,
    /// With padding.
    flat: u64,
    flat_trainable: u64,
    flat_channels: u64,
    /// Values that the backward pass needs, of one sample.
    kept: u64,
}

impl Count {
    /// `side` is the output's height and width.
    fn conv(&mut self, inputs: u64, outputs: u64, kernel: u64, side: u64) {
        self.tensor(outputs * inputs * kernel * kernel);
        if self.bias {
            self.tensor(outputs);
        }
        self.kept(outputs, side);
    }

    fn batch_norm(&mut self, channels: u64, side: u64) {
        self.tensor(channels);
        self.tensor(channels);
        self.channels += channels;
        self.flat_channels += channels.next_multiple_of(ALIGNMENT);
        self.kept(channels, side);
    }

    fn tensor(&mut self, len: u64) {
        let padded = len.next_multiple_of(ALIGNMENT);
        self.parameters += len;
        self.flat += padded;
        if self.trains {
            self.trainable += len;
            self.flat_trainable += padded;
        }
    }

    fn kept(&mut self, channels: u64, side: u64) {
        // Of what does not train nothing is differentiated.
        if self.trains {
            self.kept += channels * side * side;
        }
    }
}
