//! How two neighbours prove to each other that they hold the generation's secret: four short
//! messages, and nothing of the secret on the wire. Pure: nonces are arguments, sockets elsewhere.
//!
//! ```text
//! initiator                                   responder (its successor)
//!     hello: generation, ranks, nonce    ->
//!                                        <-   challenge: nonce, proof "responder"
//!     proof "initiator"                  ->
//!                                        <-   proof "accepted"
//! ```
//!
//! A proof is HMAC-SHA-256 under the secret of its role, the hello and the responder's nonce. The
//! roles keep one side's proof from being sent back as the other's; the nonces keep it from being
//! used again. The payload that follows is neither encrypted nor authenticated.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::Purpose;

const MAGIC: [u8; 8] = *b"MUSHRNG1";

pub(crate) const HELLO_BYTES: usize = 64;
pub(crate) const NONCE_BYTES: usize = 32;
pub(crate) const PROOF_BYTES: usize = 32;
pub(crate) const CHALLENGE_BYTES: usize = NONCE_BYTES + PROOF_BYTES;

pub(crate) type Nonce = [u8; NONCE_BYTES];

/// Which message a proof belongs to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Responder,
    Initiator,
    Accepted,
}

/// Who wants to connect with whom, in which generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Introduction {
    pub generation: u64,
    pub world: u32,
    pub from: u32,
    pub to: u32,
    pub purpose: Purpose,
}

impl Introduction {
    /// The first message.
    pub fn hello(&self, nonce: &Nonce) -> [u8; HELLO_BYTES] {
        let mut hello = [0; HELLO_BYTES];
        hello[..8].copy_from_slice(&MAGIC);
        hello[8..16].copy_from_slice(&self.generation.to_le_bytes());
        hello[16..20].copy_from_slice(&self.world.to_le_bytes());
        hello[20..24].copy_from_slice(&self.from.to_le_bytes());
        hello[24..28].copy_from_slice(&self.to.to_le_bytes());
        hello[28..32].copy_from_slice(&(self.purpose as u32).to_le_bytes());
        hello[32..].copy_from_slice(nonce);
        hello
    }

    /// Whether `hello` introduces exactly this pair, whatever its nonce.
    pub fn matches(&self, hello: &[u8; HELLO_BYTES]) -> bool {
        hello[..32] == self.hello(&[0; NONCE_BYTES])[..32]
    }
}

/// The proofs of one handshake.
pub(crate) struct Proofs {
    mac: Hmac<Sha256>,
}

impl Proofs {
    pub fn new(secret: &[u8; 32], hello: &[u8; HELLO_BYTES], responder: &Nonce) -> Self {
        let mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length");
        Self { mac: mac.chain_update(hello).chain_update(responder) }
    }

    pub fn make(&self, role: Role) -> [u8; PROOF_BYTES] {
        self.in_role(role).finalize().into_bytes().into()
    }

    /// In constant time.
    pub fn verify(&self, role: Role, proof: &[u8]) -> bool {
        self.in_role(role).verify_slice(proof).is_ok()
    }

    fn in_role(&self, role: Role) -> Hmac<Sha256> {
        let label: &[u8] = match role {
            Role::Responder => b"musher ring responder",
            Role::Initiator => b"musher ring initiator",
            Role::Accepted => b"musher ring accepted",
        };
        self.mac.clone().chain_update(label)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: Introduction =
        Introduction { generation: 5, world: 3, from: 2, to: 0, purpose: Purpose::Steps };

    #[test]
    fn a_hello_matches_its_own_pair_only() {
        let hello = PAIR.hello(&[7; NONCE_BYTES]);
        assert!(PAIR.matches(&hello));
        assert!(!Introduction { generation: 6, ..PAIR }.matches(&hello));
        assert!(!Introduction { world: 4, ..PAIR }.matches(&hello));
        assert!(!Introduction { from: 1, ..PAIR }.matches(&hello));
        assert!(!Introduction { to: 1, ..PAIR }.matches(&hello));
        assert!(!Introduction { purpose: Purpose::BatchNorm, ..PAIR }.matches(&hello));
        assert!(!PAIR.matches(&[0; HELLO_BYTES]));
    }

    #[test]
    fn a_proof_holds_for_one_secret_role_and_pair_of_nonces() {
        let hello = PAIR.hello(&[1; NONCE_BYTES]);
        let proofs = Proofs::new(&[9; 32], &hello, &[2; NONCE_BYTES]);
        let proof = proofs.make(Role::Responder);
        assert!(proofs.verify(Role::Responder, &proof));
        assert!(!proofs.verify(Role::Initiator, &proof));
        assert!(!proofs.verify(Role::Responder, &proof[..31]));
        for other in [
            Proofs::new(&[8; 32], &hello, &[2; NONCE_BYTES]),
            Proofs::new(&[9; 32], &PAIR.hello(&[3; NONCE_BYTES]), &[2; NONCE_BYTES]),
            Proofs::new(&[9; 32], &hello, &[4; NONCE_BYTES]),
        ] {
            assert!(!other.verify(Role::Responder, &proof));
        }
    }
}
