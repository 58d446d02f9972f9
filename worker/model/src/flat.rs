//! The flat buffers and the views of them that are the network's tensors. Owns memory, not meaning.

use tch::{Device, Kind, Tensor};

use crate::Error;
use crate::init;
use crate::layout::{Layout, Parameter, ParameterId, StatisticsId};

/// Flat f32 buffers of one replica. Whoever writes to one writes to the network.
#[derive(Debug)]
pub struct Flat {
    pub layout: Layout,
    /// [`Layout::parameter_len`] long.
    pub parameters: Tensor,
    /// Gradients and both Adam moments are [`Layout::trainable_len`] long.
    pub gradients: Tensor,
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    /// Batch norm's running statistics as of the last applied step: all means, then all variances.
    pub live: Tensor,
    /// Their copy that the step in flight moves.
    pub working: Tensor,
    parameter_views: Vec<Tensor>,
    statistics_views: Vec<StatisticsViews>,
}

/// One batch norm's statistics.
#[derive(Debug)]
pub struct StatisticsViews {
    pub live: Running,
    pub working: Running,
}

/// Running mean and variance, each [C].
#[derive(Debug)]
pub struct Running {
    pub mean: Tensor,
    pub var: Tensor,
}

impl Flat {
    /// Initial parameters drawn from `seed`, means 0 and variances 1, everything else 0.
    pub fn new(layout: Layout, seed: u64, device: Device) -> Result<Self, Error> {
        let zeros = |len: usize| Tensor::f_zeros([len as i64], (Kind::Float, device));
        let parameters = init::parameters(&layout, seed)?.f_to_device(device)?;
        let gradients = zeros(layout.trainable_len)?;
        let live = zeros(2 * layout.channel_len)?;
        let channels = layout.channel_len as i64;
        let _ = live.f_narrow(0, channels, channels)?.f_fill_(1.0)?;
        let working = live.f_detach_copy()?;

        let parameter_views = layout
            .parameters
            .iter()
            .map(|spec| leaf(spec, &parameters, &gradients))
            .collect::<Result<_, _>>()?;
        let statistics_views = layout
            .statistics
            .iter()
            .map(|spec| {
                let running = |flat: &Tensor| {
                    let view = |start: usize| flat.f_narrow(0, start as i64, spec.range.len() as i64);
                    Ok::<_, Error>(Running {
                        mean: view(spec.range.start)?,
                        var: view(layout.channel_len + spec.range.start)?,
                    })
                };
                Ok::<_, Error>(StatisticsViews { live: running(&live)?, working: running(&working)? })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            exp_avg: zeros(layout.trainable_len)?,
            exp_avg_sq: zeros(layout.trainable_len)?,
            layout,
            parameters,
            gradients,
            live,
            working,
            parameter_views,
            statistics_views,
        })
    }

    pub fn parameter(&self, id: ParameterId) -> &Tensor {
        &self.parameter_views[id.index()]
    }

    pub fn statistics(&self, id: StatisticsId) -> &StatisticsViews {
        &self.statistics_views[id.index()]
    }

    /// All parameters with their views, in the order of use.
    pub fn parameters(&self) -> impl Iterator<Item = (&Parameter, &Tensor)> {
        self.layout.parameters.iter().zip(&self.parameter_views)
    }

    /// All running statistics, by their full names.
    pub fn running_statistics(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.layout.statistics.iter().zip(&self.statistics_views).flat_map(|(spec, views)| {
            let name = |suffix| format!("{}.{suffix}", spec.name);
            [(name("running_mean"), &views.live.mean), (name("running_var"), &views.live.var)]
        })
    }
}

/// A parameter as a leaf of autograd whose data and gradient are views of the flat buffers.
fn leaf(spec: &Parameter, parameters: &Tensor, gradients: &Tensor) -> Result<Tensor, Error> {
    let view = |flat: &Tensor| {
        let place = flat.f_narrow(0, spec.range.start as i64, spec.range.len() as i64)?;
        let view = match *spec.shape.as_slice() {
            [outputs, inputs, height, width] => {
                place.f_view([outputs, height, width, inputs])?.f_permute([0, 3, 1, 2])?
            }
            _ => place.f_view(spec.shape.as_slice())?,
        };
        // Detached, for the leaf to be no view in autograd's eyes.
        view.f_detach()
    };
    let parameter = view(parameters)?;
    if spec.frozen {
        return Ok(parameter);
    }
    let parameter = parameter.f_set_requires_grad(true)?;
    torch_ext::set_grad(&parameter, &view(gradients)?)?;
    Ok(parameter)
}
