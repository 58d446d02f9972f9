//! What shells and manuals want of the command line.

use std::{fs, io, path::PathBuf};

use anyhow::Context;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Command, Exit, Failure, usage};

#[derive(Debug, Args)]
pub struct Completions {
    /// For which shell
    shell: Shell,
}

#[derive(Debug, Args)]
pub struct Man {
    /// Where to write them: musher.1, musher-launch.1, ...
    dir: PathBuf,
}

impl Completions {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        clap_complete::generate(self.shell, &mut Command::command(), "musher", &mut io::stdout());
        Ok(Exit::Finished)
    }
}

impl Man {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let write = || {
            fs::create_dir_all(&self.dir)?;
            clap_mangen::generate_to(Command::command(), &self.dir)
        };
        write()
            .with_context(|| format!("cannot write manual pages into {}", self.dir.display()))
            .map_err(usage)?;
        Ok(Exit::Finished)
    }
}
