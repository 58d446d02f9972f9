//! Ranges and contradictions.
//!
//! Pure: it does not ask whether files exist or addresses are free.

use super::{JobConfig, JobError, Place};

/// Schemes of object stores.
const OBJECT_STORES: [&str; 3] = ["s3://", "gs://", "az://"];

/// Samples; what one of them costs is its files' bytes in memory.
const MOST_READ_AHEAD: u32 = 65_536;

/// What is wrong with one key, before anyone knows where it was written.
#[derive(Debug)]
pub(super) struct Problem {
    pub key: &'static str,
    reason: String,
}

impl Problem {
    pub(super) fn at(self, place: Place) -> JobError {
        JobError::Invalid { key: self.key.to_owned(), place, reason: self.reason }
    }
}

/// The first problem of a configuration.
pub(super) fn check(job: &JobConfig) -> Result<(), Problem> {
    name(job)?;
    data(job)?;
    augment(job)?;
    model(job)?;
    train(job)?;
    early_stopping(job)?;
    team(job)?;
    timeouts(job)?;
    checkpoint(job)?;
    server(job)?;
    telemetry(job)
}

fn name(job: &JobConfig) -> Result<(), Problem> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name = &job.name;
    require(!name.is_empty() && !name.starts_with('.') && name.chars().all(is_plain), "name", || {
        format!("\"{name}\" cannot name a directory; use letters, digits, `-`, `_` and `.`")
    })?;
    let largest = i64::MAX as u64;
    require(job.seed <= largest, "seed", || format!("{} is above {largest}", job.seed))
}

fn data(job: &JobConfig) -> Result<(), Problem> {
    let data = &job.data;
    filled("data.root", &data.root, "the data set's directory")?;
    known("data.root", &data.root)?;
    filled("data.train_split", &data.train_split, "a split file of the data set")?;
    filled("data.val_split", &data.val_split, "a split file of the data set")?;
    memory("data.cache_mb", data.cache_mb)?;
    memory("data.device_cache_mb", data.device_cache_mb)?;
    memory("data.disk_cache_mb", data.disk_cache_mb)?;
    let share = data.val_fraction;
    require((0.0..1.0).contains(&share), "data.val_fraction", || {
        format!(
            "{share} is outside 0..1, where 0 holds nothing out and 1 leaves nothing to train on; 0.2 is usual"
        )
    })?;
    require(data.read_ahead <= MOST_READ_AHEAD, "data.read_ahead", || {
        format!("{} is above {MOST_READ_AHEAD}; 64 is the default", data.read_ahead)
    })?;
    let size = data.image_size;
    require(size >= 32 && size.is_multiple_of(32), "data.image_size", || {
        format!(
            "{size} is not a multiple of 32, as the network's five halvings need; use {}",
            near_multiple(size)
        )
    })
}

fn augment(job: &JobConfig) -> Result<(), Problem> {
    let degrees = job.augment.rotate_degrees;
    require((0.0..=180.0).contains(&degrees), "augment.rotate_degrees", || {
        format!("{degrees} is outside 0..180 degrees; use 0 for no rotation")
    })?;
    let [low, high] = job.augment.scale;
    require(0.0 < low && low <= high && high <= 1.0, "augment.scale", || {
        format!("[{low}, {high}] is no range of area fractions; use 0 < low <= high <= 1, such as [0.7, 1.0]")
    })
}

fn model(job: &JobConfig) -> Result<(), Problem> {
    let model = &job.model;
    require((3..=255).contains(&model.classes), "model.classes", || {
        format!("{} is outside 3..255; trimaps have 3 classes", model.classes)
    })?;
    require(0.0 < model.width && model.width <= 8.0, "model.width", || {
        format!("{} is not above 0 and at most 8; 1.0 is the full network", model.width)
    })?;
    require(!(model.sync_batch_norm && model.freeze_batch_norm), "model.sync_batch_norm", || {
        "model.freeze_batch_norm = true leaves no statistics to synchronise; use one of the two".into()
    })
}

fn train(job: &JobConfig) -> Result<(), Problem> {
    let train = &job.train;
    at_least_one("train.global_batch", train.global_batch)?;
    at_least_one("train.epochs", train.epochs)?;
    require(train.micro_batch <= train.global_batch, "train.micro_batch", || {
        format!(
            "{} is more than train.global_batch = {}; use 0 for a rank's whole share",
            train.micro_batch, train.global_batch
        )
    })?;
    batch_norm_has_two_values(job)?;
    let rate = train.learning_rate;
    require(rate.is_finite() && rate > 0.0, "train.learning_rate", || {
        format!("{rate} is not a finite number above 0; 0.001 is the default")
    })?;
    not_negative(
        "train.encoder_learning_rate",
        train.encoder_learning_rate,
        "use 0 for train.learning_rate there too",
    )?;
    require(
        train.encoder_learning_rate == 0.0 || !job.model.freeze_encoder,
        "train.encoder_learning_rate",
        || "model.freeze_encoder = true leaves nothing in the encoder to learn; use one of the two".into(),
    )?;
    not_negative("train.warmup_epochs", train.warmup_epochs, "use 0 for no warm-up")?;
    require(train.warmup_epochs < f64::from(train.epochs), "train.warmup_epochs", || {
        format!("{} is not below train.epochs = {}, so nothing follows", train.warmup_epochs, train.epochs)
    })?;
    loss(job)?;
    not_negative("train.clip_norm", train.clip_norm, "use 0 for no clipping")?;
    let bucket = train.bucket_mb;
    require(0.0 < bucket && bucket <= LARGEST_BUCKET_MB, "train.bucket_mb", || {
        format!("{bucket} is not above 0 and at most {LARGEST_BUCKET_MB}; 25 is the default")
    })
}

fn loss(job: &JobConfig) -> Result<(), Problem> {
    let (weights, classes) = (&job.train.class_weights, job.model.classes);
    require(weights.is_empty() || weights.len() == classes as usize, "train.class_weights", || {
        let count = weights.len();
        format!("{count} numbers do not fit model.classes = {classes}; give one a class, or [] for none")
    })?;
    let bad = weights.iter().find(|weight| !(weight.is_finite() && **weight > 0.0));
    require(bad.is_none(), "train.class_weights", || {
        let found = bad.map(f64::to_string).unwrap_or_default();
        format!("{found} is not a finite number above 0; 1.0 changes nothing")
    })?;
    not_negative("train.dice_weight", job.train.dice_weight, "use 0 for no Dice term")
}

/// More than the gradients of any network here.
const LARGEST_BUCKET_MB: f64 = 65536.0;

/// One value per channel has no variance: the running statistics would become NaN. At 32 pixels the
/// coarsest map is one pixel, and any rank's share may be one sample.
fn batch_norm_has_two_values(job: &JobConfig) -> Result<(), Problem> {
    require(job.data.image_size > 32 || job.model.freeze_batch_norm, "data.image_size", || {
        "32 leaves batch norm one value a channel where a share is one sample; use 64, or \
         model.freeze_batch_norm = true"
            .into()
    })
}

fn early_stopping(job: &JobConfig) -> Result<(), Problem> {
    at_least_one("early_stopping.patience", job.early_stopping.patience)?;
    not_negative("early_stopping.min_delta", job.early_stopping.min_delta, "use 0 to count every improvement")
}

fn team(job: &JobConfig) -> Result<(), Problem> {
    let cluster = &job.cluster;
    let (fewest, most, expected) = (cluster.min_workers, cluster.max_workers, cluster.workers);
    at_least_one("cluster.min_workers", fewest)?;
    require(fewest <= most, "cluster.max_workers", || {
        format!("{most} is below cluster.min_workers = {fewest}; raise it or lower the other")
    })?;
    require(expected == 0 || (fewest..=most).contains(&expected), "cluster.workers", || {
        format!(
            "{expected} is not between cluster.min_workers = {fewest} and cluster.max_workers = \
             {most}; use 0 to take whoever comes"
        )
    })
}

fn timeouts(job: &JobConfig) -> Result<(), Problem> {
    let cluster = &job.cluster;
    let (heartbeat, step, coordinator) =
        (cluster.heartbeat_timeout_s, cluster.step_timeout_s, cluster.coordinator_timeout_s);
    above_zero("cluster.start_timeout_s", cluster.start_timeout_s)?;
    above_zero("cluster.heartbeat_timeout_s", heartbeat)?;
    above_zero("cluster.step_timeout_s", step)?;
    above_zero("cluster.coordinator_timeout_s", coordinator)?;
    duration("cluster.regroup_window_s", cluster.regroup_window_s, "use 0 to form a team at once")?;
    require(heartbeat < step, "cluster.heartbeat_timeout_s", || {
        format!(
            "{heartbeat} s is not below cluster.step_timeout_s = {step} s, so a dead worker would \
             pass for a slow one; lower it or raise the other"
        )
    })?;
    // A restarted coordinator listens for one heartbeat time-out before it forms a team.
    require(heartbeat < coordinator, "cluster.coordinator_timeout_s", || {
        format!(
            "{coordinator} s is not above cluster.heartbeat_timeout_s = {heartbeat} s, so workers \
             would give up while a restarted coordinator still listens; raise it"
        )
    })
}

fn checkpoint(job: &JobConfig) -> Result<(), Problem> {
    known("checkpoint.store", &job.checkpoint.store)?;
    at_least_one("checkpoint.keep", job.checkpoint.keep)
}

fn server(job: &JobConfig) -> Result<(), Problem> {
    let server = &job.server;
    require(server.grpc != server.http || server.grpc.port() == 0, "server.http", || {
        format!("{} is server.grpc's address too; give it a port of its own", server.http)
    })?;
    let tls = [
        ("server.tls_cert", &server.tls_cert),
        ("server.tls_key", &server.tls_key),
        ("server.tls_client_ca", &server.tls_client_ca),
    ];
    if let Some((key, _)) = tls.iter().find(|(_, file)| file.is_empty()) {
        require(tls.iter().all(|(_, file)| file.is_empty()), key, || {
            "TLS needs all three of server.tls_cert, server.tls_key and server.tls_client_ca; name a PEM file"
                .into()
        })?;
    }
    if let Some(probes) = server.probes {
        let taken = probes.port() != 0 && (probes == server.grpc || probes == server.http);
        require(!taken, "server.probes", || {
            format!("{probes} is another service's address too; give it a port of its own")
        })?;
    }
    duration("server.linger_s", server.linger_s, "use 0 to end at once")
}

fn telemetry(job: &JobConfig) -> Result<(), Problem> {
    let collector = &job.telemetry.otlp;
    let host = ["http://", "https://"].iter().find_map(|scheme| collector.strip_prefix(scheme));
    let is_url = host.is_some_and(|host| !host.is_empty() && !host.starts_with(['/', ':']));
    require(collector.is_empty() || is_url, "telemetry.otlp", || {
        format!(
            "\"{collector}\" is no URL of a collector; write http:// or https://, host and port, such as \
             http://127.0.0.1:4317, or \"\" for no traces"
        )
    })
}

fn require(holds: bool, key: &'static str, reason: impl FnOnce() -> String) -> Result<(), Problem> {
    if holds { Ok(()) } else { Err(Problem { key, reason: reason() }) }
}

fn at_least_one(key: &'static str, value: u32) -> Result<(), Problem> {
    require(value >= 1, key, || "0 is too few; use 1 or more".into())
}

fn not_negative(key: &'static str, value: f64, off: &str) -> Result<(), Problem> {
    require(value.is_finite() && value >= 0.0, key, || {
        format!("{value} is not a finite number of at least 0; {off}")
    })
}

/// 16 TiB, which no machine has; more is bytes or KiB written for MiB.
const MOST_MB: u64 = 1 << 24;

fn memory(key: &'static str, mebibytes: u64) -> Result<(), Problem> {
    require(mebibytes <= MOST_MB, key, || {
        format!(
            "{mebibytes} MiB is more memory than there is; the unit is MiB, so 4096 is 4 GiB, and 0 keeps nothing"
        )
    })
}

/// A century, which fits every clock; more is a typing error or an infinity.
const LONGEST_S: f64 = 100.0 * 365.0 * 24.0 * 3600.0;

fn above_zero(key: &'static str, seconds: f64) -> Result<(), Problem> {
    require(seconds > 0.0 && seconds <= LONGEST_S, key, || {
        format!("{seconds} is no time to wait; use a number of seconds above 0")
    })
}

fn duration(key: &'static str, seconds: f64, off: &str) -> Result<(), Problem> {
    require((0.0..=LONGEST_S).contains(&seconds), key, || {
        format!("{seconds} is not a number of seconds of at least 0; {off}")
    })
}

fn filled(key: &'static str, value: &str, what: &str) -> Result<(), Problem> {
    require(!value.is_empty(), key, || format!("it is empty; name {what}"))
}

/// A directory or a URL. Where an object store's URL names no place in it, the store says so.
fn known(key: &'static str, place: &str) -> Result<(), Problem> {
    let is_known = is_object_store(place) || !place.contains("://") || place.starts_with("file:///");
    require(is_known, key, || {
        let scheme = place.split_once("://").map_or("", |(scheme, _)| scheme);
        format!(
            "{scheme}:// is not a kind of URL known here; use a directory, file:///DIRECTORY, or s3://, gs:// or az://"
        )
    })
}

pub(super) fn is_object_store(place: &str) -> bool {
    OBJECT_STORES.iter().any(|scheme| place.starts_with(scheme))
}

fn near_multiple(size: u32) -> u32 {
    (size / 32).max(1) * 32
}
