//! Where each tensor of the network lies in the flat buffers. No tensor is touched here.
//!
//! Layers declare their tensors in the order of use. The flat order is the reverse, so that the gradients that a
//! backward pass finishes first lie first; what is frozen lies behind all that trains.

use std::ops::Range;

/// Flat offsets are multiples of this many f32: 64 bytes, a cache line and more than any kernel asks for.
const ALIGNMENT: usize = 16;

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Glorot's uniform: within ±sqrt(6 / (fan_in + fan_out)).
    Glorot {
        fan_in: i64,
        fan_out: i64,
    },
    Zeros,
    Ones,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterId(usize);

/// One batch norm's running mean and variance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatisticsId(usize);

#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<i64>,
    pub init: Init,
    pub frozen: bool,
    /// It is a convolution's, and rounded to bf16 where training computes in that.
    pub is_factor: bool,
    /// Its elements in the flat buffer, padding not included.
    pub range: Range<usize>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    /// The batch norm's name; `.running_mean` and `.running_var` are appended to it.
    pub name: String,
    pub frozen: bool,
    /// Its channels among those of all batch norms.
    pub range: Range<usize>,
}

/// All tensors, in the order of use, with their places. In its place a kernel [outputs, inputs, height, width] lies
/// channels-last, as [outputs, height, width, inputs], and all else row-major: what a state or a bucket holds does not
/// depend on the device.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    pub parameters: Vec<Parameter>,
    pub statistics: Vec<Statistics>,
    /// Length of the flat parameters.
    pub parameter_len: usize,
    /// Length of their part that trains, a prefix. Gradients and moments have this length.
    pub trainable_len: usize,
    /// Channels of all batch norms. The flat statistics hold that many means, then that many variances.
    pub channel_len: usize,
    /// Those whose statistics are not frozen, a prefix.
    pub live_channel_len: usize,
}

impl Layout {
    /// Parameters in the order of their places.
    pub fn flat_order(&self) -> Vec<ParameterId> {
        let mut ids: Vec<_> = (0..self.parameters.len()).map(ParameterId).collect();
        ids.sort_by_key(|&ParameterId(index)| self.parameters[index].range.start);
        ids
    }

    /// The encoder's part of what trains: its end, as the encoder is used first. Empty if it is frozen.
    pub fn trainable_encoder(&self) -> Range<usize> {
        let trains = |parameter: &&Parameter| !parameter.frozen && is_encoder(&parameter.name);
        let starts = self.parameters.iter().filter(trains).map(|parameter| parameter.range.start);
        starts.min().unwrap_or(self.trainable_len)..self.trainable_len
    }

    pub fn parameter(&self, ParameterId(index): ParameterId) -> &Parameter {
        &self.parameters[index]
    }
}

/// Whether a tensor of this name is the encoder's.
pub fn is_encoder(name: &str) -> bool {
    !name.starts_with("decoder.") && !name.starts_with("head.")
}

impl ParameterId {
    pub fn at(index: usize) -> Self {
        Self(index)
    }

    pub fn index(self) -> usize {
        self.0
    }
}

impl StatisticsId {
    /// In the order of use.
    pub fn index(self) -> usize {
        self.0
    }
}

/// Collects declarations in the order of use.
#[derive(Debug, Default)]
pub struct LayoutBuilder {
    parameters: Vec<Parameter>,
    statistics: Vec<Statistics>,
}

impl LayoutBuilder {
    /// One that is computed with as it is.
    pub fn parameter(&mut self, name: String, shape: &[i64], init: Init, frozen: bool) -> ParameterId {
        self.declare(name, shape, init, frozen, false)
    }

    /// A convolution's.
    pub fn factor(&mut self, name: String, shape: &[i64], init: Init, frozen: bool) -> ParameterId {
        self.declare(name, shape, init, frozen, true)
    }

    fn declare(
        &mut self,
        name: String,
        shape: &[i64],
        init: Init,
        frozen: bool,
        is_factor: bool,
    ) -> ParameterId {
        let range = 0..shape.iter().product::<i64>() as usize;
        self.parameters.push(Parameter { name, shape: shape.to_vec(), init, frozen, is_factor, range });
        ParameterId(self.parameters.len() - 1)
    }

    pub fn statistics(&mut self, name: String, channels: i64, frozen: bool) -> StatisticsId {
        self.statistics.push(Statistics { name, frozen, range: 0..channels as usize });
        StatisticsId(self.statistics.len() - 1)
    }

    pub fn finish(self) -> Layout {
        let Self { mut parameters, mut statistics } = self;
        let (trainable_len, parameter_len) =
            place(parameters.iter_mut().map(|parameter| (parameter.frozen, &mut parameter.range)));
        let (live_channel_len, channel_len) =
            place(statistics.iter_mut().map(|statistics| (statistics.frozen, &mut statistics.range)));
        Layout { parameters, statistics, parameter_len, trainable_len, channel_len, live_channel_len }
    }
}

/// Moves each range to its place and returns the lengths of the unfrozen part and of the whole.
fn place<'a>(items: impl Iterator<Item = (bool, &'a mut Range<usize>)>) -> (usize, usize) {
    let (frozen, trainable): (Vec<_>, Vec<_>) = items.partition(|(frozen, _)| *frozen);
    let mut end = 0;
    let mut append = |ranges: Vec<(bool, &mut Range<usize>)>| {
        for (_, range) in ranges.into_iter().rev() {
            let len = range.len();
            *range = end..end + len;
            end = range.end.next_multiple_of(ALIGNMENT);
        }
        end
    };
    (append(trainable), append(frozen))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_used_lies_first_and_the_frozen_last() {
        let mut builder = LayoutBuilder::default();
        for (name, len, frozen) in [("a", 20, true), ("b", 3, false), ("c", 16, false), ("d", 1, true)] {
            builder.parameter(name.into(), &[len], Init::Zeros, frozen);
        }
        let layout = builder.finish();
        let ranges: Vec<_> = layout.parameters.iter().map(|parameter| parameter.range.clone()).collect();
        assert_eq!(ranges, [48..68, 16..19, 0..16, 32..33]);
        assert_eq!((layout.trainable_len, layout.parameter_len), (32, 80));
        let order: Vec<_> =
            layout.flat_order().into_iter().map(|id| layout.parameter(id).name.as_str()).collect();
        assert_eq!(order, ["c", "b", "d", "a"]);
    }
}
