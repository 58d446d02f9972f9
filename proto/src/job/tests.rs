//! What a person sees who writes a job file, right or wrong.
#![allow(clippy::unwrap_used)]

use super::*;

fn job(text: &str) -> Result<JobConfig, JobError> {
    load(text, "job.toml", &[])
}

fn set(assignment: &str) -> Result<JobConfig, JobError> {
    load("", "job.toml", &[assignment.to_owned()])
}

#[track_caller]
fn refused(result: Result<JobConfig, JobError>, message: &str) {
    assert_eq!(result.unwrap_err().to_string(), message);
}

#[test]
fn an_empty_file_is_the_default_job() {
    assert_eq!(job("").unwrap(), JobConfig::default());
}

#[test]
fn a_resolved_configuration_loads_to_itself() {
    let mut config = JobConfig { name: "r2.d-2".into(), ..JobConfig::default() };
    config.train.learning_rate = 1.0 / 3.0;
    config.augment.scale = [0.1, 0.9];
    config.early_stopping.monitor = Monitor::ValMiou;
    config.server.grpc = "[::1]:0".parse().unwrap();
    assert_eq!(job(&config.to_toml()).unwrap(), config);
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<JobConfig>(&json).unwrap(), config);
}

#[test]
fn the_documentation_has_all_keys_and_their_defaults() {
    let page = include_str!("../../../docs/configuration.md");
    let documented = page.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let table = documented.parse::<toml::Table>().unwrap();
    assert_eq!(table, JobConfig::default().to_toml().parse::<toml::Table>().unwrap());
}

#[test]
fn known_keys_are_full_paths() {
    let keys = known_keys();
    for key in ["name", "train.global_batch", "augment.scale", "server.grpc"] {
        assert!(keys.iter().any(|known| known == key), "{key} is missing");
    }
    assert!(!keys.iter().any(|known| known == "train"));
}

#[test]
fn an_unknown_key_names_the_nearest_one_and_its_line() {
    refused(
        job("name = \"x\"\n[train]\n\nlearnin_rate = 0.1\n"),
        "unknown key `train.learnin_rate` in job.toml line 4: did you mean `train.learning_rate`?",
    );
    refused(
        job("[data]\nlearning_rate = 0.1"),
        "unknown key `data.learning_rate` in job.toml line 2: did you mean `train.learning_rate`?",
    );
    refused(
        job("[early_stoping]\npatience = 3"),
        "unknown key `early_stoping` in job.toml line 1: did you mean `early_stopping`?",
    );
    refused(
        job("[early_stoping]"),
        "unknown key `early_stoping` in job.toml line 1: did you mean `early_stopping`?",
    );
    refused(
        job("[augment]\nzzz = 1"),
        "unknown key `augment.zzz` in job.toml line 2: [augment] has `horizontal_flip`, \
         `rotate_degrees`, `scale`",
    );
    refused(set("train.epoch=3"), "unknown key `train.epoch` in --set: did you mean `train.epochs`?");
}

#[test]
fn a_wrong_type_names_both() {
    refused(
        job("[train]\nepochs = \"ten\""),
        "`train.epochs` in job.toml line 2 must be a whole number, but is a string",
    );
    refused(job("train = 3"), "`train` in job.toml line 1 must be a section, but is a whole number");
    refused(
        set("augment.horizontal_flip=1"),
        "`augment.horizontal_flip` in --set must be true or false, but is a whole number",
    );
    refused(set("train.epochs=1.5"), "`train.epochs` in --set must be a whole number, but is a number");
    assert_eq!(job("[model]\nwidth = 1").unwrap().model.width, 1.0);
}

#[test]
fn a_choice_names_its_alternatives() {
    refused(
        job("[train]\nschedule = \"linear\""),
        "`train.schedule` in job.toml line 2: unknown variant `linear`, expected `constant` or `cosine`",
    );
    assert_eq!(set("train.compress_gradients=bf16").unwrap().train.compress_gradients, Compression::Bf16);
    refused(
        set("train.compress_gradients=fp8"),
        "`train.compress_gradients` in --set: unknown variant `fp8`, expected `none` or `bf16`",
    );
    refused(
        set("server.grpc=localhost"),
        "`server.grpc` in --set: \"localhost\" is not an address; write an IP address and a port, \
         such as 127.0.0.1:7400",
    );
    assert!(
        job("[train]\nepochs = -1").unwrap_err().to_string().contains("`train.epochs` in job.toml line 2")
    );
    assert!(
        job("[augment]\nscale = [0.5]")
            .unwrap_err()
            .to_string()
            .contains("`augment.scale` in job.toml line 2")
    );
    assert!(job("[augment]\nscale = [0.5, true]").unwrap_err().to_string().contains("in job.toml line 2"));
}

#[test]
fn choices_of_the_loss_and_the_rates_are_checked() {
    let keys = "[train]\nclass_weights = [1, 0.5, 2]\ndice_weight = 1\nwarmup_epochs = 0.5\n";
    let train = job(keys).unwrap().train;
    assert_eq!(
        (train.class_weights, train.dice_weight, train.warmup_epochs),
        (vec![1.0, 0.5, 2.0], 1.0, 0.5)
    );
    refused(
        set("train.class_weights=[1, 2]"),
        "`train.class_weights` in --set: 2 numbers do not fit model.classes = 3; give one a class, or [] for none",
    );
    refused(
        set("train.class_weights=[1, 0, 2]"),
        "`train.class_weights` in --set: 0 is not a finite number above 0; 1.0 changes nothing",
    );
    refused(
        set("train.dice_weight=-1"),
        "`train.dice_weight` in --set: -1 is not a finite number of at least 0; use 0 for no Dice term",
    );
    refused(
        set("train.warmup_epochs=100"),
        "`train.warmup_epochs` in --set: 100 is not below train.epochs = 100, so nothing follows",
    );
    refused(
        set("train.encoder_learning_rate=nan"),
        "`train.encoder_learning_rate` in --set: NaN is not a finite number of at least 0; use 0 for \
         train.learning_rate there too",
    );
    refused(
        job("[model]\nfreeze_encoder = true\n[train]\nencoder_learning_rate = 1e-4"),
        "`train.encoder_learning_rate` in job.toml line 4: model.freeze_encoder = true leaves nothing in the \
         encoder to learn; use one of the two",
    );
}

#[test]
fn broken_toml_names_its_line() {
    let message = job("name = \"x\"\n[train\nepochs = 3").unwrap_err().to_string();
    assert!(message.starts_with("job.toml line 2 is not TOML: "), "{message}");
    assert!(!message.contains('\n'));
    let twice = job("[train]\nepochs = 1\nepochs = 2").unwrap_err().to_string();
    assert!(twice.starts_with("job.toml line 3 is not TOML: "), "{twice}");
}

#[test]
fn overrides_take_toml_or_bare_text_and_the_last_one_counts() {
    let overrides = ["train.epochs=3", "train.epochs = 4", "name=2023", "augment.scale=[0.5, 1]"];
    let overrides = overrides.map(String::from);
    let config = load("name = \"x\"\n[train]\nepochs = 9\nglobal_batch = 8", "j", &overrides).unwrap();
    assert_eq!((config.train.epochs, config.train.global_batch), (4, 8));
    assert_eq!(config.name, "2023");
    assert_eq!(config.augment.scale, [0.5, 1.0]);
    assert_eq!(set("early_stopping.monitor=val_miou").unwrap().early_stopping.monitor, Monitor::ValMiou);
    assert_eq!(set("data.root=/d=1/pets").unwrap().data.root_path(), PathBuf::from("/d=1/pets"));
    assert_eq!(set("train={epochs=7}").unwrap().train.epochs, 7);
    for assignment in ["train.epochs", "=3", "train.=3", ""] {
        assert!(matches!(set(assignment), Err(JobError::NotAnAssignment { .. })), "{assignment}");
    }
}

#[test]
fn an_override_is_blamed_for_its_own_value() {
    let text = "[train]\nglobal_batch = 0";
    refused(job(text), "`train.global_batch` in job.toml line 2: 0 is too few; use 1 or more");
    refused(
        load(text, "job.toml", &["train.global_batch=0".into()]),
        "`train.global_batch` in --set: 0 is too few; use 1 or more",
    );
    assert!(load(text, "job.toml", &["train.global_batch=2".into()]).is_ok());
}

#[test]
fn values_out_of_range_are_refused() {
    let wrong = [
        "name=a/b",
        "name=",
        "name=..",
        "data.root=",
        "data.root=http://x",
        "data.image_size=0",
        "data.image_size=100",
        "data.cache_mb=4294967296",
        "data.device_cache_mb=17000000",
        "data.disk_cache_mb=17000000",
        "data.val_fraction=1",
        "data.val_fraction=-0.1",
        "data.val_fraction=nan",
        "data.read_ahead=-1",
        "data.read_ahead=70000",
        "data.augment_on=gpu",
        "telemetry.otlp=collector:4317",
        "telemetry.otlp=http://",
        "telemetry.otlp=http://:4317",
        "augment.rotate_degrees=181",
        "augment.rotate_degrees=nan",
        "augment.scale=[0.0, 1.0]",
        "augment.scale=[0.9, 0.8]",
        "augment.scale=[0.5, 1.1]",
        "model.classes=2",
        "model.width=0",
        "model.width=inf",
        "train.global_batch=0",
        "train.micro_batch=33",
        "train.epochs=0",
        "train.learning_rate=0",
        "train.learning_rate=inf",
        "train.clip_norm=-1",
        "train.bucket_mb=0",
        "train.bucket_mb=inf",
        "early_stopping.patience=0",
        "early_stopping.min_delta=-0.1",
        "cluster.min_workers=0",
        "cluster.max_workers=0",
        "cluster.workers=2000",
        "cluster.start_timeout_s=0",
        "cluster.regroup_window_s=-1",
        "cluster.heartbeat_timeout_s=60",
        "cluster.step_timeout_s=inf",
        "cluster.coordinator_timeout_s=10",
        "checkpoint.keep=0",
        "server.http=127.0.0.1:7400",
        "server.linger_s=nan",
    ];
    for assignment in wrong {
        let error = set(assignment).unwrap_err();
        assert!(matches!(error, JobError::Invalid { .. }), "{assignment}: {error}");
        let message = error.to_string();
        assert!(!message.contains('\n') && !message.ends_with('.'), "{message}");
    }
    let tiny = "[data]\nimage_size = 32\n[train]\nmicro_batch = 1";
    assert!(job(tiny).is_err());
    assert!(load(tiny, "j", &["model.freeze_batch_norm=true".into()]).is_ok());
    assert!(set("server.grpc=0.0.0.0:0").is_ok());
    assert!(set("model.sync_batch_norm=true").is_ok());
    assert!(job("[model]\nsync_batch_norm = true\nfreeze_batch_norm = true").is_err());
}

#[test]
fn choices_of_later_versions_are_refused_not_ignored() {
    refused(
        job("[train]\nprecision = \"fp16\""),
        "`train.precision` in job.toml line 2: unknown variant `fp16`, expected one of `fp32`, `tf32`, `bf16`",
    );
    for url in ["s3://b/c", "gs://b/c", "az://b/c"] {
        let data = set(&format!("data.root={url}")).unwrap().data;
        assert_eq!((data.root_path(), data.is_remote()), (PathBuf::from(url), true));
        let checkpoint = set(&format!("checkpoint.store={url}")).unwrap().checkpoint;
        assert_eq!((checkpoint.store.as_str(), checkpoint.store_path()), (url, None));
    }
    assert!(set("checkpoint.store=ftp://b/c").is_err());
    assert_eq!(set("cluster.device=cuda").unwrap().cluster.device, Device::Cuda);
    let local = set("checkpoint.store=file:///var/ck").unwrap();
    assert_eq!(local.checkpoint.store_path(), Some(PathBuf::from("/var/ck")));
}

#[test]
fn encoder_and_normalisation_follow_the_weights_name_where_they_may() {
    use EncoderVariant::{Keras, Torchvision};
    let of = |pretrained: &str, more: &[&str]| {
        let mut assignments = vec![format!("model.pretrained={pretrained}")];
        assignments.extend(more.iter().map(|&assignment| assignment.to_owned()));
        let job = load("", "j", &assignments).unwrap();
        let resolved = job.resolved();
        assert_eq!((resolved.encoder(), resolved.normalize()), (job.encoder(), job.normalize()));
        assert_eq!(resolved.resolved(), resolved);
        (job.encoder(), job.normalize())
    };
    let auto = &["data.normalize=auto"][..];
    assert_eq!(of("", auto), (Torchvision, Normalize::Unit));
    assert_eq!(of("w.pth", auto), (Torchvision, Normalize::Imagenet));
    assert_eq!(of("torchvision:resnet50", auto), (Torchvision, Normalize::Imagenet));
    assert_eq!(of("https://h/W.H5?a=1#sha256=ab", auto), (Keras, Normalize::Caffe));
    assert_eq!(of("w.h5", &[]), (Keras, Normalize::Unit));
    assert_eq!(of("w.h5", &["model.encoder=torchvision"]), (Torchvision, Normalize::Unit));
    assert_eq!(
        of("best.safetensors", &["model.encoder=keras", "data.normalize=auto"]),
        (Keras, Normalize::Caffe)
    );
}
