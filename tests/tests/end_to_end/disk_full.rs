//! A disk that fills up while a checkpoint is written.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output},
};

use musher_tests::{Job, Scene};

/// A small file system in memory, for as long as the value lives.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// # Errors
    /// What `mount` said, where it is not allowed.
    fn mount(dir: PathBuf, megabytes: u32) -> Result<Self, String> {
        fs::create_dir_all(&dir).expect("the scene's directory is writable");
        let size = format!("size={megabytes}m");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&dir).output();
        succeeded(mount).map(|()| Self(dir))
    }

    fn grow(&self, megabytes: u32) {
        let size = format!("remount,size={megabytes}m");
        succeeded(Command::new("mount").args(["-o", &size]).arg(&self.0).output())
            .expect("mounting is allowed");
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).output();
    }
}

fn succeeded(output: std::io::Result<Output>) -> Result<(), String> {
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// A checkpoint of the tiny network with its weights is 4.1 MB: the first fits, the second does not.
#[test]
fn a_full_disk_costs_checkpoints_but_not_those_before() {
    let scene = Scene::new();
    let disk = match Tmpfs::mount(scene.path("disk"), 6) {
        Ok(disk) => disk,
        Err(reason) => return println!("skipped: a tmpfs can't be mounted here: {reason}"),
    };
    let store = disk.0.join("checkpoints");
    let job = Job::tiny(&scene.data())
        .set("train.epochs", 3)
        .set("checkpoint.store", format!("{:?}", store.display().to_string()));
    let run = scene.launch(&job, "full", 2, &[]).wait().expect_code(1);

    assert_eq!(run.one("checkpoint_committed").text("id"), "e0001-s00000005");
    for failed in run.all("checkpoint_failed") {
        assert!(failed.text("reason").contains("no space left"), "{failed:?}");
    }
    assert_eq!(run.all("checkpoint_failed").len(), 2);
    assert_eq!(run.all("epoch_finished").len(), 3, "training went on");
    let reason = run.one("run_failed").text("reason").to_owned();
    assert!(reason.contains("the last checkpoint, e0003-s00000015, could not be written"), "{reason}");
    assert!(run.end.last_words().contains(&reason), "{}", run.end.stderr);
    let left: Vec<_> = fs::read_dir(&store).expect("it is there").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["e0001-s00000005"], "nothing half-written stays");

    disk.grow(64);
    let resumed = scene.launch(&job, "full", 2, &["--resume"]).wait().expect_code(0);
    assert_eq!(resumed.one("run_started").text("resumed_from"), "e0001-s00000005");
    assert_eq!(resumed.end.last_line()["epochs"], 3);
}
