//! `musher compare`: runs beside each other, as a picture, a page and a table.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, anyhow};
use clap::Args;

use super::{Exit, Failure, usage};
use crate::compare::{self, RunHistory};

#[derive(Debug, Args)]
pub struct Compare {
    /// Run directories; those with the same LABEL are runs of one kind, told also as their mean
    #[arg(required = true, value_name = "[LABEL=]DIR")]
    runs: Vec<String>,
    /// Where compare.png and compare.html go
    #[arg(long, value_name = "DIR", default_value = ".")]
    out: PathBuf,
    /// Print the table as JSON
    #[arg(long)]
    json: bool,
}

impl Compare {
    pub(super) fn run(self) -> Result<Exit, Failure> {
        let named = named(&self.runs).map_err(usage)?;
        let runs: Result<Vec<_>, _> =
            named.into_iter().map(|(label, dir)| RunHistory::read(&dir, label)).collect();
        let runs = runs.map_err(usage)?;
        fs::create_dir_all(&self.out)
            .with_context(|| format!("cannot create {}", self.out.display()))
            .map_err(usage)?;
        let write = |name: &str, bytes: Vec<u8>| {
            let file = self.out.join(name);
            fs::write(&file, bytes).with_context(|| format!("cannot write {}", file.display()))?;
            anyhow::Ok(file)
        };
        let picture = write("compare.png", compare::png(&runs))?;
        let page = write("compare.html", compare::html(&runs).into_bytes())?;
        match self.json {
            true => println!("{}", compare::as_json(&runs)),
            false => print!("{}", compare::as_text(&runs)),
        }
        eprintln!("curves: {}   page: {}", picture.display(), page.display());
        Ok(Exit::Finished)
    }
}

/// Labels and directories; without a label of its own a run is called after its directory.
fn named(runs: &[String]) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let mut seen = HashSet::new();
    let mut named = Vec::new();
    for run in runs {
        // A directory's own name may have an equals sign.
        let (label, dir) = match run.split_once('=').filter(|_| !Path::new(run).exists()) {
            Some(("", _)) => return Err(anyhow!("`{run}` has no label before its `=`: write LABEL=DIR")),
            Some((label, dir)) => (Some(label.to_owned()), PathBuf::from(dir)),
            None => (None, PathBuf::from(run)),
        };
        if !seen.insert(dir.clone()) {
            return Err(anyhow!("{} is named twice: name each run once", dir.display()));
        }
        named.push((label, dir));
    }
    let name_of = |dir: &Path| dir.file_name().map(|name| name.to_string_lossy().into_owned());
    let unlabelled: Vec<_> =
        named.iter().filter(|(label, _)| label.is_none()).map(|(_, dir)| dir.clone()).collect();
    let own_name = |dir: PathBuf| {
        let name = name_of(&dir).filter(|name| {
            unlabelled.iter().filter(|other| name_of(other).as_ref() == Some(name)).count() == 1
        });
        name.unwrap_or_else(|| dir.display().to_string())
    };
    Ok(named.into_iter().map(|(label, dir)| (label.unwrap_or_else(|| own_name(dir.clone())), dir)).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn labels(runs: &[&str]) -> Vec<String> {
        let runs: Vec<_> = runs.iter().map(|run| run.to_string()).collect();
        named(&runs).unwrap().into_iter().map(|(label, _)| label).collect()
    }

    #[test]
    fn runs_are_called_as_said_or_after_their_directories() {
        assert_eq!(labels(&["runs/a", "b=runs/a2", "b=runs/c/"]), ["a", "b", "b"]);
        assert_eq!(labels(&["x/small", "y/small"]), ["x/small", "y/small"]);
        assert!(named(&["=runs/a".into()]).is_err());
        assert!(named(&["runs/a".into(), "b=runs/a".into()]).is_err());
    }
}
