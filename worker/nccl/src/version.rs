//! Which NCCL will do.

use std::fmt;

use crate::ExchangeError;

/// As `ncclGetVersion` counts: 10000 x major + 100 x minor + patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub i32);

impl Version {
    /// The oldest that recovers in process. Non-blocking communicators, which alone can be aborted safely, came
    /// with 2.14. Up to 2.18 `ncclCommAbort` from another thread hangs, as NVIDIA says in
    /// <https://github.com/NVIDIA/nccl/issues/992> (mended in 2.19.1), and 2.21 to 2.23 wait for ever where a network
    /// request has failed (<https://github.com/aws/aws-ofi-nccl/pull/683>). `ncclCommRevoke`, which came with 2.28,
    /// is used where it is there.
    pub const MINIMUM: Self = Self(2_24_00);
    /// Ends "is too old: ".
    pub(crate) const WHY: &str = "up to 2.23 an abort can hang, or a failed peer go unnoticed";

    pub fn check(self) -> Result<(), ExchangeError> {
        if self < Self::MINIMUM { Err(ExchangeError::TooOld { found: self }) } else { Ok(()) }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Before 2.9 it was 1000 x major.
        let (major, rest) = match self.0 {
            0..10_000 => (self.0 / 1_000, self.0 % 1_000),
            code => (code / 10_000, code % 10_000),
        };
        write!(f, "{major}.{}.{}", rest / 100, rest % 100)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_nccl_writes_them() {
        let text = |code| Version(code).to_string();
        assert_eq!(
            (text(22_809), text(21_903), text(2_804)),
            ("2.28.9".into(), "2.19.3".into(), "2.8.4".into())
        );
    }

    #[test]
    fn what_is_too_old_is_told_in_one_sentence() {
        assert!(Version(22_809).check().is_ok());
        assert!(Version::MINIMUM.check().is_ok());
        let refused = Version(22_304).check().map_err(|error| error.to_string());
        assert_eq!(
            refused,
            Err("NCCL 2.23.4 is too old: up to 2.23 an abort can hang, or a failed peer go unnoticed, so Musher \
                 needs 2.24.0 or newer; the CUDA build of libtorch 2.11 brings 2.28.9"
                .into())
        );
    }
}
