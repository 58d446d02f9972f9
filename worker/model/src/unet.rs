//! The network: a ResNet50 encoder and a decoder of four stages, after Ronneberger et al., "U-Net" (2015).
//!
//! Encoder tensors carry torchvision's names (`conv1.weight`, `layer1.0.downsample.1.running_mean`). Decoder stage
//! `i` of 0..4, coarsest first, has `decoder.i.up` (transposed convolution), `decoder.i.up_bn`, `decoder.i.conv1`,
//! `decoder.i.bn1`, `decoder.i.conv2`, `decoder.i.bn2`; the last layer is `head`.

use tch::Tensor;
use torch_ext::Join;

use crate::Error;
use crate::flat::Flat;
use crate::layers::{BatchNorm, BatchNormOptions, Conv, Pass, Scope, UpConv};
use crate::layout::LayoutBuilder;
use crate::options::{Encoder, ModelOptions};

/// The encoder's outputs from fine to coarse, at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's size.
pub type Taps = [Tensor; 5];

/// A bottleneck's output channels over its inner ones.
const EXPANSION: i64 = 4;

#[derive(Debug)]
pub struct Unet {
    stem: Conv,
    stem_bn: BatchNorm,
    stages: [Vec<Bottleneck>; 4],
    decoder: [DecoderStage; 4],
    head: Conv,
}

impl Unet {
    /// Declares all tensors in the order of use. `options` must be valid.
    pub fn declare(options: &ModelOptions, layout: &mut LayoutBuilder) -> Self {
        let w = |channels| options.scaled(channels);
        let (eps, momentum, bias) = match options.encoder {
            Encoder::Torchvision => (1e-5, 0.1, false),
            Encoder::Keras => (1.001e-5, 0.01, true),
        };
        let frozen = options.freeze_encoder || options.freeze_batch_norm;
        let batch_norm = BatchNormOptions { eps, momentum, frozen };
        let encoder = &mut Scope { layout, batch_norm, bias, frozen: options.freeze_encoder };

        let stem = Conv::declare(encoder, "conv1", 3, w(64), 7, 2);
        let stem_bn = BatchNorm::declare(encoder, "bn1", w(64));
        let mut inputs = w(64);
        let stages = [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)];
        let stages = std::array::from_fn(|stage| {
            let (channels, blocks, stride) = stages[stage];
            let mut declare = |block| {
                let name = format!("layer{}.{block}", stage + 1);
                let stride = if block == 0 { stride } else { 1 };
                let block = Bottleneck::declare(encoder, &name, inputs, w(channels), stride, options.encoder);
                inputs = w(channels) * EXPANSION;
                block
            };
            (0..blocks).map(&mut declare).collect()
        });

        let batch_norm = BatchNormOptions { eps: 1e-3, momentum: 0.01, frozen: options.freeze_batch_norm };
        let decoder_scope = &mut Scope { layout: encoder.layout, batch_norm, bias: true, frozen: false };
        let skips = [w(256) * EXPANSION, w(128) * EXPANSION, w(64) * EXPANSION, w(64)];
        let outputs = [w(1024), w(512), w(256), w(64)];
        let decoder = std::array::from_fn(|stage| {
            let declared = DecoderStage::declare(
                decoder_scope,
                &format!("decoder.{stage}"),
                inputs,
                skips[stage],
                outputs[stage],
            );
            inputs = outputs[stage];
            declared
        });
        let head = Conv::declare(decoder_scope, "head", inputs, options.classes as i64, 3, 1);
        Self { stem, stem_bn, stages, decoder, head }
    }

    /// Images [N, 3, S, S] to logits [N, classes, S/2, S/2].
    pub fn forward(&self, flat: &Flat, images: &Tensor, pass: Pass) -> Result<Tensor, Error> {
        let [skip2, skip4, skip8, skip16, mut x] = self.encode(flat, images, pass)?;
        for (stage, skip) in self.decoder.iter().zip([skip16, skip8, skip4, skip2]) {
            x = stage.forward(flat, &x, &skip, pass)?;
        }
        self.head.forward(flat, &x, pass)
    }

    pub fn encode(&self, flat: &Flat, images: &Tensor, pass: Pass) -> Result<Taps, Error> {
        let stem = self.stem.forward(flat, images, pass)?;
        let stem = self.stem_bn.forward(flat, &stem, pass)?.f_relu_()?;
        let mut x = stem.f_max_pool2d(3, 2, 1, 1, false)?;
        let mut stage = |blocks: &[Bottleneck]| {
            for block in blocks {
                x = block.forward(flat, &x, pass)?;
            }
            Ok::<_, Error>(x.shallow_clone())
        };
        let [stage1, stage2, stage3, stage4] = &self.stages;
        let taps = [stage(stage1)?, stage(stage2)?, stage(stage3)?, stage(stage4)?];
        let [x4, x8, x16, x32] = taps;
        Ok([stem, x4, x8, x16, x32])
    }
}

/// He et al., "Deep Residual Learning" (2015), in its v1 or v1.5 form.
#[derive(Debug)]
struct Bottleneck {
    convs: [(Conv, BatchNorm); 3],
    downsample: Option<(Conv, BatchNorm)>,
}

impl Bottleneck {
    fn declare(
        scope: &mut Scope,
        name: &str,
        inputs: i64,
        channels: i64,
        stride: i64,
        encoder: Encoder,
    ) -> Self {
        let outputs = channels * EXPANSION;
        let (stride1, stride2) = match encoder {
            Encoder::Torchvision => (1, stride),
            Encoder::Keras => (stride, 1),
        };
        let mut conv = |index, inputs, outputs, kernel, stride| {
            let conv = Conv::declare(scope, &format!("{name}.conv{index}"), inputs, outputs, kernel, stride);
            (conv, BatchNorm::declare(scope, &format!("{name}.bn{index}"), outputs))
        };
        let convs = [
            conv(1, inputs, channels, 1, stride1),
            conv(2, channels, channels, 3, stride2),
            conv(3, channels, outputs, 1, 1),
        ];
        let downsample = (stride != 1 || inputs != outputs).then(|| {
            let conv = Conv::declare(scope, &format!("{name}.downsample.0"), inputs, outputs, 1, stride);
            (conv, BatchNorm::declare(scope, &format!("{name}.downsample.1"), outputs))
        });
        Self { convs, downsample }
    }

    fn forward(&self, flat: &Flat, x: &Tensor, pass: Pass) -> Result<Tensor, Error> {
        let normalised = |(conv, bn): &(Conv, BatchNorm), x: &Tensor| {
            Ok::<_, Error>(bn.forward(flat, &conv.forward(flat, x, pass)?, pass)?)
        };
        let [first, second, third] = &self.convs;
        let y = normalised(first, x)?.f_relu_()?;
        let y = normalised(second, &y)?.f_relu_()?;
        let mut y = normalised(third, &y)?;
        let mut sum = match &self.downsample {
            Some(downsample) => y.f_add_(&normalised(downsample, x)?)?,
            None => y.f_add_(x)?,
        };
        Ok(sum.f_relu_()?)
    }
}

/// Upsamples, joins the encoder's finer features, convolves twice; ReLU before batch norm throughout.
#[derive(Debug)]
struct DecoderStage {
    up: UpConv,
    up_bn: BatchNorm,
    convs: [(Conv, BatchNorm); 2],
}

impl DecoderStage {
    fn declare(scope: &mut Scope, name: &str, inputs: i64, skip: i64, outputs: i64) -> Self {
        let up = UpConv::declare(scope, &format!("{name}.up"), inputs, outputs);
        let up_bn = BatchNorm::declare(scope, &format!("{name}.up_bn"), outputs);
        let mut conv = |index, inputs| {
            let conv = Conv::declare(scope, &format!("{name}.conv{index}"), inputs, outputs, 3, 1);
            (conv, BatchNorm::declare(scope, &format!("{name}.bn{index}"), outputs))
        };
        Self { up, up_bn, convs: [conv(1, outputs + skip), conv(2, outputs)] }
    }

    fn forward(&self, flat: &Flat, x: &Tensor, skip: &Tensor, pass: Pass) -> Result<Tensor, Error> {
        let [first, second] = &self.convs;
        let mut joined = match (self.up_bn.by_batch(pass), pass.on_host) {
            // Without the three in four pixels of the upsampled image that are alike.
            (Some(by_batch), Some(factors)) => {
                let (even, background) = (self.up.even_pixels(flat, x, factors)?, self.up.background(flat));
                let (sparse, constant) = self.up_bn.spread(flat, &even, background, by_batch)?;
                first.0.of_join(flat, Join { sparse: &sparse, constant: &constant, skip }, factors)?
            }
            _ => {
                let up = self.up.forward(flat, x, pass)?.f_relu_()?;
                let up = self.up_bn.forward(flat, &up, pass)?;
                first.0.forward(flat, &Tensor::f_cat(&[&up, skip], 1)?, pass)?
            }
        };
        let x = first.1.forward(flat, &joined.f_relu_()?, pass)?;
        Ok(second.1.forward(flat, &second.0.forward(flat, &x, pass)?.f_relu_()?, pass)?)
    }
}

#[cfg(test)]
mod tests {
    use musher_proto::{job, size::NetworkSize};

    use super::*;
    use crate::state::StateLayout;

    /// What a job is told before anything runs, and what its network then is.
    #[track_caller]
    fn check(encoder: Encoder, width: f64, classes: usize, freeze_encoder: bool) -> NetworkSize {
        let name = match encoder {
            Encoder::Torchvision => "torchvision",
            Encoder::Keras => "keras",
        };
        let overrides = [
            format!("model.encoder={name}"),
            format!("model.width={width}"),
            format!("model.classes={classes}"),
            format!("model.freeze_encoder={freeze_encoder}"),
        ];
        let job = job::load("", "test", &overrides).expect("it is a job");
        let options = ModelOptions { classes, encoder, width, freeze_encoder, ..ModelOptions::default() };
        let mut layout = LayoutBuilder::default();
        Unet::declare(&options, &mut layout);
        let layout = layout.finish();
        let said = NetworkSize::of(&job);
        let count = |trains: &dyn Fn(bool) -> bool| {
            let meant = layout.parameters.iter().filter(|parameter| trains(parameter.frozen));
            meant.map(|parameter| parameter.range.len() as u64).sum::<u64>()
        };
        assert_eq!((said.parameters, said.trainable), (count(&|_| true), count(&|frozen| !frozen)));
        assert_eq!(said.state_bytes, StateLayout::new(&layout).total_bytes());
        said
    }

    #[test]
    fn its_size_is_what_is_said_before_it_is_made() {
        for encoder in [Encoder::Torchvision, Encoder::Keras] {
            for (width, classes) in [(0.05, 3), (0.25, 3), (0.331, 7), (1.0, 3), (2.0, 21)] {
                for freeze_encoder in [false, true] {
                    check(encoder, width, classes, freeze_encoder);
                }
            }
        }
        let article = check(Encoder::Torchvision, 1.0, 3, false);
        assert_eq!((article.parameters, article.state_bytes / 1_000_000), (63_564_867, 763));
    }
}
