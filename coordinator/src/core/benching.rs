//! Who is kept out of the team for a while: the member that what all say of their links speaks against. Which that is
//! `evidence` decides.

use std::time::Duration;

use musher_proto::{
    ids::{Rank, Session},
    message::Waited,
};

use super::{
    Bench, Core, Gathering, Phase,
    effects::{Action, RunEvent, Time},
    evidence,
    reasons::{Departure, Wait},
    roster::Team,
    seconds,
};

/// A worker that is put out again and again stays out for so many step time-outs at most.
const LONGEST_BENCH: u32 = 16;

impl Core {
    /// Takes a member's testimony. A connection that was closed in an orderly way, or a short wait, says
    /// nothing about links.
    pub(super) fn hear(&mut self, session: Session, waited: Waited) {
        let long = seconds(self.job.cluster.step_timeout_s) / 2;
        if let Phase::Gathering(Gathering { inquest: Some(inquest), former: Some(team), .. }) =
            &mut self.phase
            && let Some(rank) = team.rank_of(session)
            && !waited.closed
            && Duration::from_millis(waited.ms) >= long
        {
            inquest.push((rank, waited));
        }
    }

    /// Benches the member that the evidence speaks against, if there is any.
    pub(super) fn put_out(
        &mut self,
        team: &Team,
        testimony: &[(Rank, Waited)],
        now: Time,
        out: &mut Vec<Action>,
    ) {
        let newest = self.newest_held();
        let holds_it = |session: Session| self.peers.get(&session).is_some_and(|p| p.held() == newest);
        let holders: Vec<Rank> = team
            .members()
            .filter(|(_, session)| newest.is_some() && holds_it(*session))
            .map(|(rank, _)| rank)
            .collect();
        let Some(rank) = evidence::verdict(testimony, team.world(), &holders) else { return };
        let witness = testimony.iter().find(|(witness, waited)| *witness == rank || waited.peer == rank);
        let Some((_, waited)) = witness else { return };
        let Some(mut peer) = team.session_of(rank).and_then(|session| self.peers.get_mut(&session)) else {
            return;
        };
        let bench = self.bench.entry(peer.worker().clone()).or_insert(Bench { until: now, times: 0 });
        let rounds = 1u32.checked_shl(bench.times).unwrap_or(u32::MAX).min(LONGEST_BENCH);
        let benched = seconds(self.job.cluster.step_timeout_s) * rounds;
        *bench = Bench { until: now + benched, times: bench.times + 1 };
        peer.benched = Some(bench.until);
        let departure = Departure::Unreachable { wait: wait(waited), benched };
        let worker = peer.worker().clone();
        self.last_trouble = Some(format!("worker {worker} was put out: {departure}"));
        out.push(Action::Emit(RunEvent::WorkerLeft { worker, rank: Some(rank), departure }));
    }

    /// Those whose time on the bench is over are as good as newcomers.
    pub(super) fn end_benches(&mut self, now: Time, out: &mut Vec<Action>) {
        if self.peers.count().benched == 0 {
            return;
        }
        let over = |peer: &super::Peer| peer.benched.is_some_and(|until| now >= until);
        let free: Vec<Session> = self.peers.iter().filter(|(_, p)| over(p)).map(|(&s, _)| s).collect();
        for session in free {
            self.is_ready(session, now, out);
        }
    }
}

/// What a member waited for in the exchange.
pub(super) fn wait(waited: &Waited) -> Wait {
    let Waited { step, phase, ms, .. } = waited;
    Wait { step: *step, phase: format!("exchange, {phase}"), waited: Duration::from_millis(*ms) }
}
