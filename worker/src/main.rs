//! The command `musher-worker`.

use std::process::ExitCode;

use clap::Parser;
use musher_worker::cli::Command;

fn main() -> ExitCode {
    Command::parse().run()
}
