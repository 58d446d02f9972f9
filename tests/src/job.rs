//! Job files.

use std::{collections::BTreeMap, fmt::Display, fs, net::TcpListener, path::Path};

use crate::DataSet;

/// A job's keys, as `section.key = value` lines of TOML.
#[derive(Clone, Debug)]
pub struct Job {
    keys: BTreeMap<String, String>,
}

impl Job {
    /// Seconds for a run: a network of 1/16 width on 64 pixels, 2 epochs, any free ports.
    pub fn tiny(data: &DataSet) -> Self {
        let root = format!("{:?}", data.root().display().to_string());
        Self { keys: BTreeMap::new() }
            .set("name", "\"tiny\"")
            .set("data.root", root)
            .set("data.image_size", 64)
            .set("model.width", 0.0625)
            .set("train.global_batch", 8)
            .set("train.epochs", 2)
            // What tests compare, they compare on every machine.
            .set("cluster.device", "\"cpu\"")
            .set("cluster.regroup_window_s", 0.2)
            .set("cluster.start_timeout_s", 30)
            .set("server.grpc", "\"127.0.0.1:0\"")
            .set("server.http", "\"127.0.0.1:0\"")
    }

    /// Ends only when it is stopped.
    pub fn endless(self) -> Self {
        self.set("train.epochs", 100_000).set("early_stopping.patience", 100_000)
    }

    /// Time-outs that a test can wait out, in seconds.
    pub fn hasty(self) -> Self {
        self.set("cluster.heartbeat_timeout_s", 2.0).set("cluster.step_timeout_s", 3.0)
    }

    /// On a port that stays the same over restarts of the coordinator.
    pub fn on_one_port(self) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        self.set("server.grpc", format!("\"{}\"", free.expect("there is a free port")))
    }

    /// `value` is TOML.
    pub fn set(mut self, key: &str, value: impl Display) -> Self {
        self.keys.insert(key.into(), value.to_string());
        self
    }

    pub fn write(&self, to: &Path) {
        let text: String = self.keys.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        fs::write(to, text).expect("the scene's directory is writable");
    }
}
