//! The network's layers: descriptions that name their tensors by id, and compute on the tensors of a [`Flat`].

use tch::{TchError, Tensor};
use torch_ext::{Factors, Join, Norm};

use crate::Error;
use crate::flat::{Flat, Running};
use crate::layout::{Init, LayoutBuilder, ParameterId, StatisticsId};
use crate::over_ranks::{self, OverRanks};

/// Declares layers of one part of the network.
pub struct Scope<'a> {
    pub layout: &'a mut LayoutBuilder,
    pub batch_norm: BatchNormOptions,
    /// Whether convolutions have biases.
    pub bias: bool,
    /// Whether parameters stay as they are.
    pub frozen: bool,
}

#[derive(Debug, Clone, Copy)]
pub struct BatchNormOptions {
    pub eps: f64,
    /// The new value's weight in a running statistic.
    pub momentum: f64,
    /// Whether running statistics are used, and left alone, in training too.
    pub frozen: bool,
}

/// What batch norm normalises by, where it is not frozen.
#[derive(Clone, Copy)]
pub enum Normalise<'a> {
    /// The live statistics.
    ByLive,
    /// The batch, which moves the working statistics.
    ByBatch,
    /// The batches of all ranks, which move the working statistics.
    OverRanks(&'a OverRanks),
}

/// How a pass through the network computes.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub norm: Normalise<'a>,
    /// On the CPU: convolutions may be products of matrices, of such factors.
    pub on_host: Option<Factors>,
    /// Convolutions take the flat parameters' copy in bf16.
    pub rounded: bool,
}

impl Pass<'_> {
    /// A convolution's parameter, as this pass computes with it.
    fn factor<'f>(&self, flat: &'f Flat, id: ParameterId) -> &'f Tensor {
        if self.rounded { flat.rounded(id) } else { flat.parameter(id) }
    }
}

/// A product of a 3x3 kernel in f32 pays up to this many pixels for each input channel: it takes each pixel nine times,
/// where oneDNN's kernels rearrange each weight three times a step. Measured by the example `conv_routes`; level up to
/// about 2.
const PIXELS_PER_CHANNEL: i64 = 1;

/// Whether the part of a 3x3 kernel that is for `inputs` channels had better be a product, for images like `x`.
fn pays_as_product(x: &Tensor, inputs: i64, factors: Factors) -> Result<bool, TchError> {
    let (samples, _, height, width) = x.size4()?;
    Ok(match factors {
        Factors::F32 => samples * height * width <= PIXELS_PER_CHANNEL * inputs,
        Factors::Bf16 => true,
    })
}

#[derive(Debug)]
pub struct Conv {
    weight: ParameterId,
    bias: Option<ParameterId>,
    inputs: i64,
    kernel: i64,
    stride: i64,
}

impl Conv {
    /// A square convolution, padded such that stride 1 keeps the size.
    pub fn declare(
        scope: &mut Scope,
        name: &str,
        inputs: i64,
        outputs: i64,
        kernel: i64,
        stride: i64,
    ) -> Self {
        let area = kernel * kernel;
        let init = Init::Glorot { fan_in: inputs * area, fan_out: outputs * area };
        let weight = scope.layout.factor(
            format!("{name}.weight"),
            &[outputs, inputs, kernel, kernel],
            init,
            scope.frozen,
        );
        let bias = scope
            .bias
            .then(|| scope.layout.factor(format!("{name}.bias"), &[outputs], Init::Zeros, scope.frozen));
        Self { weight, bias, inputs, kernel, stride }
    }

    pub fn forward(&self, flat: &Flat, x: &Tensor, pass: Pass) -> Result<Tensor, Error> {
        let weight = pass.factor(flat, self.weight);
        let bias = self.bias.map(|bias| pass.factor(flat, bias));
        if let Some(factors) = pass.on_host {
            let product = |x: &Tensor| torch_ext::conv_as_product(x, weight, bias, factors);
            match self.kernel {
                1 => return Ok(product(&every(x, self.stride)?)?),
                3 if self.pays_as_product(x, factors)? => return Ok(every(&product(x)?, self.stride)?),
                _ => {}
            }
        }
        let padding = self.kernel / 2;
        let with = |weight: &Tensor| x.f_conv2d(weight, bias, self.stride, padding, 1, 1);
        Ok(match pass.on_host {
            Some(_) => with(&torch_ext::row_major(weight)?)?,
            None => with(weight)?,
        })
    }

    /// A stride leaves three in four of a product's pixels out, which pays in bf16 alone.
    fn pays_as_product(&self, x: &Tensor, factors: Factors) -> Result<bool, TchError> {
        Ok((self.stride == 1 || factors == Factors::Bf16) && pays_as_product(x, self.inputs, factors)?)
    }

    /// Of an image and a skip behind it; see [`torch_ext::conv_of_join`]. It must be 3x3, with a bias.
    pub fn of_join(&self, flat: &Flat, join: Join, factors: Factors) -> Result<Tensor, Error> {
        let by_product = pays_as_product(join.skip, join.skip.size()[1], factors)?;
        let bias = self.bias.expect("the decoder's convolutions have biases");
        let (weight, bias) = (flat.parameter(self.weight), flat.parameter(bias));
        Ok(torch_ext::conv_of_join(join, weight, bias, by_product, factors)?)
    }
}

/// Every so many-th pixel of each row and column.
fn every(x: &Tensor, stride: i64) -> Result<Tensor, TchError> {
    if stride == 1 {
        return Ok(x.shallow_clone());
    }
    x.f_slice(2, 0, None, stride)?.f_slice(3, 0, None, stride)
}

/// A transposed 1x1 convolution of stride 2, its output exactly twice as high and wide: every other row and column
/// holds the bias alone.
#[derive(Debug)]
pub struct UpConv {
    weight: ParameterId,
    bias: ParameterId,
}

impl UpConv {
    pub fn declare(scope: &mut Scope, name: &str, inputs: i64, outputs: i64) -> Self {
        let init = Init::Glorot { fan_in: inputs, fan_out: outputs };
        let weight =
            scope.layout.factor(format!("{name}.weight"), &[inputs, outputs, 1, 1], init, scope.frozen);
        let bias = scope.layout.factor(format!("{name}.bias"), &[outputs], Init::Zeros, scope.frozen);
        Self { weight, bias }
    }

    pub fn forward(&self, flat: &Flat, x: &Tensor, pass: Pass) -> Result<Tensor, TchError> {
        let (stride, padding, output_padding) = (2, 0, 1);
        let (weight, bias) = (pass.factor(flat, self.weight), Some(pass.factor(flat, self.bias)));
        x.f_conv_transpose2d(weight, bias, stride, padding, output_padding, 1, 1)
    }

    /// The even pixels of what [`Self::forward`] makes, [N, C, H, W]; elsewhere it is [`Self::background`].
    pub fn even_pixels(&self, flat: &Flat, x: &Tensor, factors: Factors) -> Result<Tensor, Error> {
        let (weight, bias) = (flat.parameter(self.weight), flat.parameter(self.bias));
        Ok(torch_ext::conv_as_transposed_product(x, weight, Some(bias), factors)?)
    }

    pub fn background<'a>(&self, flat: &'a Flat) -> &'a Tensor {
        flat.parameter(self.bias)
    }
}

#[derive(Debug)]
pub struct BatchNorm {
    weight: ParameterId,
    bias: ParameterId,
    statistics: StatisticsId,
    options: BatchNormOptions,
}

impl BatchNorm {
    pub fn declare(scope: &mut Scope, name: &str, channels: i64) -> Self {
        let options = scope.batch_norm;
        Self {
            weight: scope.layout.parameter(format!("{name}.weight"), &[channels], Init::Ones, scope.frozen),
            bias: scope.layout.parameter(format!("{name}.bias"), &[channels], Init::Zeros, scope.frozen),
            statistics: scope.layout.statistics(name.into(), channels, options.frozen),
            options,
        }
    }

    pub fn forward(&self, flat: &Flat, x: &Tensor, pass: Pass) -> Result<Tensor, TchError> {
        let by_own = |by_batch| {
            let Norm { weight, bias, running_mean, running_var, momentum, eps } = self.norm(flat, by_batch);
            let (mean, var) = (Some(running_mean), Some(running_var));
            x.f_batch_norm(Some(weight), Some(bias), mean, var, by_batch, momentum, eps, true)
        };
        match self.normalise(pass) {
            Normalise::ByLive => by_own(false),
            Normalise::ByBatch => by_own(true),
            Normalise::OverRanks(ranks) => {
                let layer = self.statistics.index() as u32;
                over_ranks::batch_norm(x, layer, self.norm(flat, true), ranks)
            }
        }
    }

    /// After ReLU, of an image that holds `x` at its even pixels and `background` elsewhere; see [`torch_ext::spread`].
    pub fn spread(
        &self,
        flat: &Flat,
        x: &Tensor,
        background: &Tensor,
        by_batch: bool,
    ) -> Result<(Tensor, Tensor), Error> {
        Ok(torch_ext::spread(x, background, self.norm(flat, by_batch), by_batch)?)
    }

    /// Whether it normalises by its own batch, or else by the live statistics; `None`: by the batches of all ranks.
    pub fn by_batch(&self, pass: Pass) -> Option<bool> {
        match self.normalise(pass) {
            Normalise::ByLive => Some(false),
            Normalise::ByBatch => Some(true),
            Normalise::OverRanks(_) => None,
        }
    }

    fn normalise<'a>(&self, pass: Pass<'a>) -> Normalise<'a> {
        if self.options.frozen { Normalise::ByLive } else { pass.norm }
    }

    /// With the statistics that a batch moves, or those that stand.
    fn norm<'a>(&self, flat: &'a Flat, by_batch: bool) -> Norm<'a> {
        let statistics = flat.statistics(self.statistics);
        let Running { mean, var } = if by_batch { &statistics.working } else { &statistics.live };
        Norm {
            weight: flat.parameter(self.weight),
            bias: flat.parameter(self.bias),
            running_mean: mean,
            running_var: var,
            momentum: self.options.momentum,
            eps: self.options.eps,
        }
    }
}
