//! The network's layers: descriptions that name their tensors by id, and compute on the tensors of a [`Flat`].

use tch::{TchError, Tensor};

use crate::flat::Flat;
use crate::layout::{Init, LayoutBuilder, ParameterId, StatisticsId};
use crate::replica::Mode;

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

    /// In training, normalises by the batch and moves the working statistics; else by the live statistics.
    pub fn forward(&self, flat: &Flat, x: &Tensor, mode: Mode) -> Result<Tensor, TchError> {
        let training = mode == Mode::Train && !self.options.frozen;
        let statistics = flat.statistics(self.statistics);
        let running = if training { &statistics.working } else { &statistics.live };
        x.f_batch_norm(
            Some(flat.parameter(self.weight)),
            Some(flat.parameter(self.bias)),
            Some(&running.mean),
            Some(&running.var),
            training,
            self.options.momentum,
            self.options.eps,
            true,
        )
    }
}
