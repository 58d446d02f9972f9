//! The flat buffers and the views of them that are the network's tensors. Owns memory, not meaning.

use tch::{Device, Kind, Tensor};

use crate::Error;
use crate::init;
use crate::layout::{Layout, Parameter, ParameterId, StatisticsId};
use crate::options::Manner;

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
    rounded: Option<Rounded>,
}

/// The parameters in bf16, as training computes with some of them.
#[derive(Debug)]
struct Rounded {
    flat: Tensor,
    /// By parameter; `None` where it is computed with as it is.
    views: Vec<Option<Tensor>>,
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
    pub fn new(layout: Layout, seed: u64, device: Device, manner: Manner) -> Result<Self, Error> {
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
            .map(|spec| {
                let leaf = leaf(spec, &parameters)?;
                if manner == Manner::Host && !spec.frozen {
                    torch_ext::set_grad(&leaf, &view(spec, &gradients)?)?;
                }
                Ok::<_, Error>(leaf)
            })
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
            rounded: None,
        })
    }

    /// From now on there is a copy in bf16 of what convolutions compute with, or there is none.
    pub fn keep_rounded(&mut self, keep: bool) -> Result<(), Error> {
        self.rounded = None;
        if keep {
            let flat = self.parameters.f_to_kind(Kind::BFloat16)?;
            let views = self.layout.parameters.iter();
            let views = views.map(|spec| spec.is_factor.then(|| leaf(spec, &flat)).transpose());
            let views = views.collect::<Result<_, _>>()?;
            self.rounded = Some(Rounded { flat, views });
        }
        Ok(())
    }

    pub fn is_rounded(&self) -> bool {
        self.rounded.is_some()
    }

    /// Makes the copy in bf16, if there is one, that of the parameters as they are.
    pub fn round(&self) -> Result<(), Error> {
        match &self.rounded {
            Some(Rounded { flat, .. }) => Ok(flat.shallow_clone().f_copy_(&self.parameters)?),
            None => Ok(()),
        }
    }

    /// A parameter in bf16, if it is rounded and there is a copy, or as it is.
    pub fn rounded(&self, id: ParameterId) -> &Tensor {
        let rounded = self.rounded.as_ref().and_then(|rounded| rounded.views[id.index()].as_ref());
        rounded.unwrap_or(&self.parameter_views[id.index()])
    }

    /// What trains: each leaf that a backward pass gives a gradient to, with the gradient's place.
    pub fn trained(&self) -> impl Iterator<Item = (&Parameter, &Tensor)> {
        let leaves = (0..self.parameter_views.len()).map(|index| self.rounded(ParameterId::at(index)));
        self.layout.parameters.iter().zip(leaves).filter(|(spec, _)| !spec.frozen)
    }

    /// A parameter's part of the flat gradient, in its shape.
    pub fn gradient_place(&self, spec: &Parameter) -> Result<Tensor, Error> {
        view(spec, &self.gradients)
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

/// A parameter's part of a flat buffer, in its shape; detached, for it to be no view in autograd's eyes.
fn view(spec: &Parameter, flat: &Tensor) -> Result<Tensor, Error> {
    let place = flat.f_narrow(0, spec.range.start as i64, spec.range.len() as i64)?;
    let view = match *spec.shape.as_slice() {
        [outputs, inputs, height, width] => {
            place.f_view([outputs, height, width, inputs])?.f_permute([0, 3, 1, 2])?
        }
        _ => place.f_view(spec.shape.as_slice())?,
    };
    Ok(view.f_detach()?)
}

/// A parameter as a leaf of autograd whose data is a view of the flat buffer.
fn leaf(spec: &Parameter, parameters: &Tensor) -> Result<Tensor, Error> {
    let parameter = view(spec, parameters)?;
    Ok(if spec.frozen { parameter } else { parameter.f_set_requires_grad(true)? })
}
