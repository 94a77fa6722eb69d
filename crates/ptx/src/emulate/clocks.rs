//! Vector clocks: what a warp knows to have happened.
//!
//! Agents of a cluster of W warps: each warp (`0..W`), its stream of `wgmma` (`W..2W`), of `cp.async` (`2W..3W`) and of
//! bulk copies (`3W..4W`), then each mbarrier, as the agent of the asynchronous writes that complete on it. An agent's
//! events are numbered: by epochs that end with a release (warps), by groups (`wgmma`), by operations (copies), by phases
//! (mbarriers). An event happened before a warp's next instruction if the warp's clock for the agent has reached it.

/// The last event of each agent that is known to have happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Clock(Vec<u32>);

impl Clock {
    pub(super) fn get(&self, agent: u16) -> u32 {
        self.0.get(agent as usize).copied().unwrap_or(0)
    }

    /// Learns that `agent` has come to `event`.
    pub(super) fn learn(&mut self, agent: u16, event: u32) {
        let agent = agent as usize;
        if self.0.len() <= agent {
            self.0.resize(agent + 1, 0);
        }
        self.0[agent] = self.0[agent].max(event);
    }

    pub(super) fn join(&mut self, other: &Clock) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            *mine = (*mine).max(*theirs);
        }
    }
}

/// What a warp knows, and which of it the asynchronous proxy may rely on: generic writes become visible to it by a proxy
/// fence, and that knowledge travels with the rest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Clocks {
    /// What has happened.
    pub seen: Clock,
    /// What has happened before a proxy fence.
    pub visible: Clock,
}

impl Clocks {
    pub(super) fn join(&mut self, other: &Clocks) {
        self.seen.join(&other.seen);
        self.visible.join(&other.visible);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joining_takes_the_later_of_each() {
        let (mut a, mut b) = (Clock::default(), Clock::default());
        a.learn(0, 3);
        b.learn(2, 5);
        b.learn(0, 1);
        a.join(&b);
        assert_eq!((a.get(0), a.get(1), a.get(2), a.get(9)), (3, 0, 5, 0));
        a.learn(2, 4);
        assert_eq!(a.get(2), 5);
    }
}
