//! Networks of a test's own, whose links can be cut: a namespace for each host, all joined by two
//! bridges. Over the control network workers reach the coordinator, over the peer network each other.
//!
//! Needs the rights of an administrator. Nothing of it is seen from outside, and all of it goes with
//! the value.

use std::{
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
};

/// See the module's documentation. Processes in it are to be ended before it.
#[derive(Debug)]
pub struct Network {
    /// Namespaces, the bridges' first.
    namespaces: Vec<Namespace>,
}

/// One of a worker's two links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Control,
    Peers,
}

impl Link {
    const ALL: [Self; 2] = [Self::Control, Self::Peers];

    fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Peers => "peers",
        }
    }

    /// The host's interface, and its end at the bridge.
    fn of(self, host: usize) -> String {
        format!("{}-{host}", self.name())
    }

    fn address(self, host: usize) -> String {
        let network = match self {
            Self::Control => 1,
            Self::Peers => 2,
        };
        format!("10.77.{network}.{}", host + 1)
    }
}

/// Where a process runs.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// `None`: where the test does.
    namespace: Option<String>,
}

impl Host {
    /// `command` as it is to be started on this host.
    pub fn command(&self, command: Command) -> Command {
        let Some(namespace) = &self.namespace else { return command };
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", namespace]).arg(command.get_program()).args(command.get_args());
        if let Some(dir) = command.get_current_dir() {
            inside.current_dir(dir);
        }
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => inside.env(key, value),
                None => inside.env_remove(key),
            };
        }
        inside
    }
}

impl Network {
    /// A coordinator's host and `workers` more.
    ///
    /// # Errors
    /// What the system said, where it is not allowed.
    pub fn build(workers: usize) -> Result<Self, String> {
        static BUILT: AtomicU32 = AtomicU32::new(0);
        let name = format!("musher-{}-{}", process::id(), BUILT.fetch_add(1, Ordering::Relaxed));
        let mut network = Self { namespaces: vec![Namespace::add(format!("{name}-bridges"))?] };
        for link in Link::ALL {
            network.bridges().ip(&["link", "add", link.name(), "type", "bridge"])?;
            network.bridges().ip(&["link", "set", link.name(), "up"])?;
        }
        for host in 0..=workers {
            network.namespaces.push(Namespace::add(format!("{name}-{host}"))?);
            for link in Link::ALL {
                network.connect(host, link)?;
            }
        }
        Ok(network)
    }

    fn connect(&self, host: usize, link: Link) -> Result<(), String> {
        let (bridges, inside) = (self.bridges(), &self.namespaces[host + 1]);
        let name = link.of(host);
        ip(&["link", "add", &name, "netns", &bridges.0, "type", "veth", "peer", &name, "netns", &inside.0])?;
        bridges.ip(&["link", "set", &name, "master", link.name(), "up"])?;
        inside.ip(&["address", "add", &format!("{}/24", link.address(host)), "dev", &name])?;
        inside.ip(&["link", "set", &name, "up"])
    }

    fn bridges(&self) -> &Namespace {
        &self.namespaces[0]
    }

    fn host(&self, host: usize) -> Host {
        Host { namespace: Some(self.namespaces[host + 1].0.clone()) }
    }

    pub fn coordinator(&self) -> Host {
        self.host(0)
    }

    /// Where the coordinator is to listen.
    pub fn coordinator_address(&self) -> String {
        format!("{}:7400", Link::Control.address(0))
    }

    /// From 1.
    pub fn worker(&self, worker: usize) -> Host {
        self.host(worker)
    }

    /// Where its peers reach it.
    pub fn peer_address(&self, worker: usize) -> String {
        Link::Peers.address(worker)
    }

    /// From now on nothing goes either way, and nobody is told.
    pub fn cut(&self, worker: usize, link: Link) {
        self.switch(worker, link, "down");
    }

    pub fn heal(&self, worker: usize, link: Link) {
        self.switch(worker, link, "up");
    }

    fn switch(&self, worker: usize, link: Link, to: &str) {
        self.bridges().ip(&["link", "set", &link.of(worker), to]).expect("the link was built");
    }
}

/// A network namespace, removed with the value.
#[derive(Debug)]
struct Namespace(String);

impl Namespace {
    fn add(name: String) -> Result<Self, String> {
        ip(&["netns", "add", &name])?;
        let namespace = Self(name);
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    fn ip(&self, args: &[&str]) -> Result<(), String> {
        ip(&[&["-n", &self.0], args].concat())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = ip(&["netns", "delete", &self.0]);
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    match Command::new("ip").args(args).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            Err(format!("ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
        }
        Err(error) => Err(format!("ip can't be run: {error}")),
    }
}
