//! Who may speak with a coordinator: the certificates of both sides, tokens, and the roles that they give.
//!
//! It decides nothing about runs and carries no message; the coordinator's shell guards its services with it, and
//! workers and the command line show who they are.

mod client;
mod issue;
mod role;
mod server;
mod token;
mod waiting;

pub use client::{Credentials, CredentialsArgs, CredentialsError, Identified, Link, broken_trust, fault};
pub use issue::{Authority, IssueError, Issued, Leaf, Validity, write};
pub use role::Role;
pub use server::{TlsError, TlsFiles, TlsServer, Unwelcome};
pub use token::{Token, TokenError};
pub use waiting::{Known, WaitingPlace, WaitingRoom};
