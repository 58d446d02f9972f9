//! The network's layers: descriptions that name their tensors by id, and compute on the tensors of a [`Flat`].

use tch::{TchError, Tensor};

use crate::flat::{Flat, Running};
use crate::layout::{Init, LayoutBuilder, ParameterId, StatisticsId};
use crate::over_ranks::{self, Norm, OverRanks};

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

#[derive(Debug)]
pub struct Conv {
    weight: ParameterId,
    bias: Option<ParameterId>,
    stride: i64,
    padding: i64,
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
        let weight = scope.layout.parameter(
            format!("{name}.weight"),
            &[outputs, inputs, kernel, kernel],
            init,
            scope.frozen,
        );
        let bias = scope
            .bias
            .then(|| scope.layout.parameter(format!("{name}.bias"), &[outputs], Init::Zeros, scope.frozen));
        Self { weight, bias, stride, padding: kernel / 2 }
    }

    pub fn forward(&self, flat: &Flat, x: &Tensor) -> Result<Tensor, TchError> {
        let bias = self.bias.map(|bias| flat.parameter(bias));
        x.f_conv2d(flat.parameter(self.weight), bias, self.stride, self.padding, 1, 1)
    }
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
            scope.layout.parameter(format!("{name}.weight"), &[inputs, outputs, 1, 1], init, scope.frozen);
        let bias = scope.layout.parameter(format!("{name}.bias"), &[outputs], Init::Zeros, scope.frozen);
        Self { weight, bias }
    }

    pub fn forward(&self, flat: &Flat, x: &Tensor) -> Result<Tensor, TchError> {
        let (stride, padding, output_padding) = (2, 0, 1);
        let bias = Some(flat.parameter(self.bias));
        x.f_conv_transpose2d(flat.parameter(self.weight), bias, stride, padding, output_padding, 1, 1)
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

    pub fn forward(&self, flat: &Flat, x: &Tensor, norm: Normalise) -> Result<Tensor, TchError> {
        let BatchNormOptions { eps, momentum, frozen } = self.options;
        let norm = if frozen { Normalise::ByLive } else { norm };
        let statistics = flat.statistics(self.statistics);
        let (weight, bias) = (flat.parameter(self.weight), flat.parameter(self.bias));
        let by = |running: &Running, batch: bool| {
            let (mean, var) = (Some(&running.mean), Some(&running.var));
            x.f_batch_norm(Some(weight), Some(bias), mean, var, batch, momentum, eps, true)
        };
        match norm {
            Normalise::ByLive => by(&statistics.live, false),
            Normalise::ByBatch => by(&statistics.working, true),
            Normalise::OverRanks(ranks) => {
                let layer = self.statistics.index() as u32;
                let Running { mean: running_mean, var: running_var } = &statistics.working;
                let norm = Norm { layer, weight, bias, running_mean, running_var, momentum, eps };
                over_ranks::batch_norm(x, &norm, ranks)
            }
        }
    }
}
