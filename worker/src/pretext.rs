//! Pretraining of the encoder on a task that needs no masks: which way up a picture is, or which animal it shows.
//!
//! It stands in for ImageNet's weights where they can't be had. One process, one device, no team: a linear layer on
//! the mean of the encoder's coarsest features, trained together with the encoder by the job's optimizer, batches and
//! augmentation. The decoder stays as drawn.

use std::{collections::HashMap, sync::Arc};

use musher_dataset::{BatchPlan, DatasetError, Split};
use musher_model::{Mode, Replica};
use musher_proto::{
    ids::{Epoch, Rank},
    job::JobConfig,
    shard::{Segment, scramble},
};
use tch::{Device, Kind, Reduction, Tensor};
use thiserror::Error;
use torch_ext::{AdamStep, OnDevice, fused_adam};

use crate::train::{Batches, DeviceBatch, Feed, TrainError, TrainingData, model_options, validation_units};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Task {
    /// By which quarter turns a picture was turned: needs no labels
    Rotation,
    /// Cat or dog: the third column of the split lists
    Species,
    /// One of 37: the second column of the split lists
    Breed,
}

#[derive(Debug, Error)]
pub enum PretextError {
    #[error(
        "{list} line {line} has no {what} of {name} in column {column}: use a data set whose lists have the columns \
         NAME CLASS SPECIES BREED, or --task rotation"
    )]
    NoLabel { list: String, line: usize, name: String, what: &'static str, column: usize },
    #[error(transparent)]
    Train(#[from] TrainError),
    #[error(transparent)]
    Data(#[from] DatasetError),
    #[error(transparent)]
    Model(#[from] musher_model::Error),
    #[error(transparent)]
    Torch(#[from] tch::TchError),
    #[error(transparent)]
    Extension(#[from] torch_ext::Error),
}

/// An encoder on its way.
pub struct Pretext {
    job: Arc<JobConfig>,
    feed: Feed,
    labels: Labels,
    replica: Replica,
    head: Head,
}

/// What an epoch came to.
#[derive(Clone, Copy, Debug)]
pub struct EpochResult {
    /// Mean cross-entropy over the training samples.
    pub loss: f64,
    /// Share of the validation samples that are told right.
    pub accuracy: f64,
}

impl Pretext {
    pub fn new(job: JobConfig, task: Task, data: TrainingData, device: Device) -> Result<Self, PretextError> {
        let labels = Labels::of(task, &job, &data)?;
        let replica = Replica::new(&model_options(&job), job.seed, device)?;
        let features = (2048.0 * job.model.width).round_ties_even() as i64;
        let head = Head::new(labels.classes(), features, device)?;
        let job = Arc::new(job);
        let feed = Feed::new(job.clone(), data, device)?;
        Ok(Self { job, feed, labels, replica, head })
    }

    /// One pass over the training samples, and one over those of validation.
    pub fn epoch(&mut self, epoch: Epoch) -> Result<EpochResult, PretextError> {
        let samples = self.feed.train_samples();
        let segment = Segment {
            seed: self.job.seed,
            epoch,
            cursor: 0,
            end: samples,
            samples,
            global_batch: u64::from(self.job.train.global_batch),
        };
        let plan = segment.steps(Rank(0), 1).map(move |shard| BatchPlan {
            key: shard.positions.start,
            epoch: epoch.0,
            sample_ids: shard.sample_ids,
        });
        let mut loss = 0.0;
        for batch in all(self.feed.training(plan)?) {
            let batch = batch?;
            loss += self.step(&batch, epoch)? * batch.sample_ids.len() as f64;
        }
        Ok(EpochResult { loss: loss / samples as f64, accuracy: self.accuracy()? })
    }

    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// Mean loss over the batch.
    fn step(&mut self, batch: &DeviceBatch, epoch: Epoch) -> Result<f64, PretextError> {
        let (images, labels) = self.labels.ask(batch, &self.labels.train, epoch.0)?;
        self.replica.begin_step()?;
        self.replica.zero_gradients()?;
        let logits = self.head.forward(&self.replica.encode(&images, Mode::Train)?[4])?;
        let loss = logits.f_cross_entropy_loss::<Tensor>(&labels, None, Reduction::Mean, -100, 0.0)?;
        self.replica.backward_sum(&loss)?;
        let applies = Tensor::f_ones([1], (Kind::Float, images.device()))?;
        self.replica.update(self.job.train.learning_rate, &applies, None)?;
        self.replica.settle(true);
        self.head.update(self.job.train.learning_rate)?;
        Ok(loss.f_double_value(&[])?)
    }

    fn accuracy(&self) -> Result<f64, PretextError> {
        let units = validation_units(&self.feed, &self.job);
        let plan = (0..units.count()).map(move |index| BatchPlan {
            key: index,
            epoch: 0,
            sample_ids: units.positions(index).collect(),
        });
        let mut right = 0;
        for batch in all(self.feed.validation(plan)?) {
            let (images, labels) = self.labels.ask(&batch?, &self.labels.val, 0)?;
            let features = self.replica.encode(&images, Mode::Eval)?;
            let logits = tch::no_grad(|| self.head.forward(&features[4]))?;
            right +=
                logits.f_argmax(1, false)?.f_eq_tensor(&labels)?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        }
        Ok(right as f64 / self.feed.val_samples() as f64)
    }
}

fn all(mut batches: Batches) -> impl Iterator<Item = Result<DeviceBatch, TrainError>> {
    std::iter::from_fn(move || batches.next())
}

/// The right answers.
struct Labels {
    task: Task,
    seed: u64,
    /// By sample id; empty for rotation, whose answers are drawn.
    train: Vec<i64>,
    val: Vec<i64>,
}

impl Labels {
    fn of(task: Task, job: &JobConfig, data: &TrainingData) -> Result<Self, PretextError> {
        let read = |split: &Split| match task {
            Task::Rotation => Ok(Vec::new()),
            Task::Breed => column(split, 1, "class"),
            Task::Species => column(split, 2, "species"),
        };
        let (train, val) = (read(&data.dataset.train())?, read(&data.dataset.val())?);
        Ok(Self { task, seed: job.seed, train, val })
    }

    fn classes(&self) -> i64 {
        match self.task {
            Task::Rotation => 4,
            Task::Species | Task::Breed => {
                self.train.iter().chain(&self.val).max().map_or(1, |largest| largest + 1)
            }
        }
    }

    /// Images [N, 3, S, S] and the answers, i64 [N]; for rotation the images are turned, each epoch anew.
    fn ask(&self, batch: &DeviceBatch, known: &[i64], epoch: u32) -> Result<(Tensor, Tensor), PretextError> {
        let device = batch.images.device();
        if self.task != Task::Rotation {
            let answers: Vec<_> = batch.sample_ids.iter().map(|&id| known[id as usize]).collect();
            return Ok((batch.images.shallow_clone(), Tensor::f_from_slice(&answers)?.f_to_device(device)?));
        }
        let draw = |&id: &u64| (scramble(scramble(self.seed ^ scramble(epoch.into())) ^ id) % 4) as i64;
        let turns: Vec<_> = batch.sample_ids.iter().map(draw).collect();
        let turned = (0..).zip(&turns).map(|(row, &turns)| batch.images.f_get(row)?.f_rot90(turns, [1, 2]));
        let images = Tensor::f_stack(&turned.collect::<Result<Vec<_>, _>>()?, 0)?;
        Ok((images, Tensor::f_from_slice(&turns)?.f_to_device(device)?))
    }
}

/// The numbers of one column of a split list, counted from 0, by sample id.
fn column(split: &Split, column: usize, what: &'static str) -> Result<Vec<i64>, PretextError> {
    let words = split.text.lines().map(|line| line.split('#').next().unwrap_or_default().split_whitespace());
    let rows: HashMap<_, _> = (1..)
        .zip(words)
        .filter_map(|(line, mut words)| {
            let name = words.next()?;
            let number = words.nth(column - 1).and_then(|number| number.parse::<i64>().ok());
            Some((name, (line, number.filter(|number| (1..=1000).contains(number)))))
        })
        .collect();
    let label = |sample: &musher_dataset::Sample| {
        let (line, number) = rows.get(sample.name.as_str()).copied().unwrap_or_default();
        number.map(|number| number - 1).ok_or_else(|| PretextError::NoLabel {
            list: split.list.clone(),
            line,
            name: sample.name.clone(),
            what,
            column: column + 1,
        })
    };
    split.samples.iter().map(label).collect()
}

/// A linear layer on the mean over the image, with an Adam of its own.
struct Head {
    /// [classes, features]
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: u32,
}

impl Head {
    fn new(classes: i64, features: i64, device: Device) -> Result<Self, tch::TchError> {
        let zeros = || Tensor::f_zeros([classes, features], (Kind::Float, device));
        Ok(Self {
            weight: zeros()?.f_set_requires_grad(true)?,
            exp_avg: zeros()?,
            exp_avg_sq: zeros()?,
            steps: 0,
        })
    }

    /// Features [N, C, H, W] to logits [N, classes].
    fn forward(&self, features: &Tensor) -> Result<Tensor, tch::TchError> {
        let mean = features.f_mean_dim([2, 3].as_slice(), false, Kind::Float)?;
        mean.f_linear::<Tensor>(&self.weight, None)
    }

    fn update(&mut self, lr: f64) -> Result<(), PretextError> {
        self.steps += 1;
        let step = AdamStep { lr, beta1: 0.9, beta2: 0.999, eps: 1e-7, step: f64::from(self.steps) };
        let mut gradient = self.weight.f_grad()?;
        let weight = self.weight.f_detach()?;
        fused_adam(&weight, &gradient, &self.exp_avg, &self.exp_avg_sq, step, OnDevice::default())?;
        let _ = gradient.f_zero_()?;
        Ok(())
    }
}
