//! The one task that owns the core. It feeds events and deadlines in, and performs actions in order:
//! what is to be persisted is on disk before anything after it is sent.

use std::{collections::BTreeMap, collections::VecDeque, sync::Arc};

use anyhow::Context;
use musher_proto::{
    ids::Session,
    job::JobConfig,
    message::{Fenced, ToWorker},
};
use tokio::{sync::mpsc, task, time};
use tracing::{debug, warn};

use super::{Handle, Input, checkpoints::Uploads, sessions::Outbox};
use crate::{
    announce::Announcer,
    core::{Action, Core, Event, Outcome, RunEvent, Time},
    http::metrics::Metrics,
    run_dir::RunDir,
    store::{self, StoreError},
    traces::Tracer,
};

pub(super) struct Actor {
    core: Core,
    job: JobConfig,
    run_dir: Arc<RunDir>,
    uploads: Arc<Uploads>,
    audience: Audience,
    handle: Handle,
    started: time::Instant,
    sessions: BTreeMap<Session, Outbox>,
    /// Events that performing an action gave rise to.
    follow_ups: VecDeque<Event>,
}

/// Who hears of the run's events.
pub(super) struct Audience {
    pub announcer: Announcer,
    pub metrics: Arc<Metrics>,
    pub tracer: Option<Tracer>,
}

impl Actor {
    pub fn new(
        core: Core,
        job: JobConfig,
        run_dir: RunDir,
        uploads: Arc<Uploads>,
        audience: Audience,
        handle: Handle,
        started: time::Instant,
    ) -> Self {
        Self {
            core,
            job,
            run_dir: Arc::new(run_dir),
            uploads,
            audience,
            handle,
            started,
            sessions: BTreeMap::new(),
            follow_ups: VecDeque::new(),
        }
    }

    pub async fn run(
        mut self,
        mut inbox: mpsc::Receiver<Input>,
        first: Vec<Action>,
    ) -> anyhow::Result<Outcome> {
        if let Some(outcome) = self.perform_all(first).await? {
            return Ok(outcome);
        }
        loop {
            let deadline = self.core.next_deadline().map(|at| self.started + at);
            let input = tokio::select! {
                input = inbox.recv() => input.context("the inbox stays open as long as the actor holds a handle")?,
                () = until(deadline) => Input::Event(Event::TimePassed),
            };
            let event = match input {
                Input::Event(event) => {
                    if let Event::SessionClosed { session, .. } = &event {
                        self.sessions.remove(session);
                    }
                    event
                }
                Input::SessionOpened { event, session, outbox } => {
                    self.sessions.insert(session, outbox);
                    event
                }
                // Whatever it decided from here on, nothing of it would last.
                Input::Fenced { reason } => {
                    self.perform(Action::Emit(RunEvent::RunFailed { reason: reason.clone() })).await?;
                    anyhow::bail!(reason);
                }
                Input::Status { reply } => {
                    let _ = reply.send(self.core.status(self.now()));
                    continue;
                }
            };
            debug!(?event);
            let actions = self.core.handle(self.now(), event);
            if let Some(outcome) = self.perform_all(actions).await? {
                return Ok(outcome);
            }
        }
    }

    fn now(&self) -> Time {
        self.started.elapsed()
    }

    async fn perform_all(&mut self, actions: Vec<Action>) -> anyhow::Result<Option<Outcome>> {
        let mut queue = VecDeque::from(actions);
        loop {
            while let Some(action) = queue.pop_front() {
                if let Some(outcome) = self.perform(action).await? {
                    return Ok(Some(outcome));
                }
            }
            let Some(event) = self.follow_ups.pop_front() else { return Ok(None) };
            queue.extend(self.core.handle(self.now(), event));
        }
    }

    async fn perform(&mut self, action: Action) -> anyhow::Result<Option<Outcome>> {
        if let Some(tracer) = &mut self.audience.tracer {
            tracer.observe(self.started.elapsed(), &action);
        }
        match action {
            Action::Persist(state) => {
                let run_dir = self.run_dir.clone();
                task::spawn_blocking(move || run_dir.persist(&state))
                    .await?
                    .context("the run's state could not be persisted, so it can't go on")?;
            }
            Action::Send { session, message } => self.send(session, message),
            Action::CloseSession { session } => {
                self.sessions.remove(&session);
            }
            Action::OpenCheckpoint { checkpoint, lineage, state_bytes } => {
                let opened = task::block_in_place(|| self.uploads.open(&checkpoint, lineage, state_bytes));
                if let Err(error) = opened {
                    self.follow_ups
                        .push_back(Event::CheckpointFailed { checkpoint, reason: error.to_string() });
                }
            }
            Action::CommitCheckpoint(commit) => {
                let (uploads, run_dir, job) = (self.uploads.clone(), self.run_dir.clone(), self.job.clone());
                let handle = self.handle.clone();
                task::spawn(async move {
                    let checkpoint = commit.checkpoint.clone();
                    let done = task::spawn_blocking(move || uploads.commit(&commit, &job, &run_dir)).await;
                    let event = match done {
                        Ok(Ok(bytes)) => Event::CheckpointCommitted { checkpoint, bytes },
                        Ok(Err(error @ StoreError::Fenced { .. })) => {
                            let _ = handle.send(Input::Fenced { reason: error.to_string() }).await;
                            return;
                        }
                        Ok(Err(error)) => Event::CheckpointFailed { checkpoint, reason: error.to_string() },
                        Err(panic) => Event::CheckpointFailed { checkpoint, reason: panic.to_string() },
                    };
                    handle.tell(event).await;
                });
            }
            Action::AbandonCheckpoint { checkpoint } => {
                let abandoned = self.uploads.abandon(&checkpoint);
                task::spawn_blocking(move || drop(abandoned));
            }
            Action::WriteSamples { epoch, png, best } => {
                let dir = self.run_dir.samples();
                let written = task::spawn_blocking(move || {
                    store::write_atomically(&dir.join(format!("epoch-{:04}.png", epoch.0)), &png)?;
                    if best { store::write_atomically(&dir.join("best.png"), &png) } else { Ok(()) }
                });
                if let Err(error) = written.await? {
                    warn!(%error, "the picture of predictions could not be written");
                }
            }
            Action::Emit(event) => {
                self.audience.metrics.observe(&event);
                self.audience.announcer.announce(&event);
            }
            Action::End(outcome) => return Ok(Some(outcome)),
        }
        Ok(None)
    }

    fn send(&mut self, session: Session, message: Fenced<ToWorker>) {
        let Some(outbox) = self.sessions.get(&session) else { return };
        if outbox.try_send(Box::new(message)).is_err() {
            // The worker does not read, or is gone.
            self.sessions.remove(&session);
            let reason = "it does not read what it is sent".into();
            self.follow_ups.push_back(Event::SessionClosed { session, reason });
        }
    }
}

async fn until(deadline: Option<time::Instant>) {
    match deadline {
        Some(at) => time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
