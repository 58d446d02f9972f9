//! The command `musher`.

use std::process::ExitCode;

use clap::Parser;
use musher_coordinator::cli::Command;

fn main() -> ExitCode {
    Command::parse().run()
}
