//! The command `musher`.

use std::{
    panic,
    process::{self, ExitCode},
};

use clap::Parser;
use musher_coordinator::cli::Command;

/// As a shell has it of a program that SIGPIPE ended.
const NOBODY_READS: i32 = 141;

fn main() -> ExitCode {
    end_quietly_when_nobody_reads();
    Command::parse().run()
}

/// `musher ... | head` is no failure of ours. SIGPIPE itself stays ignored: a server must not die of a client that left.
fn end_quietly_when_nobody_reads() {
    let otherwise = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let said = info.payload_as_str().unwrap_or_default();
        if said.contains("failed printing to stdout") && said.contains("Broken pipe") {
            process::exit(NOBODY_READS);
        }
        otherwise(info);
    }));
}
