//! The run's curves as an event file that TensorBoard opens: a TFRecord for each event with figures.
//!
//! A life of the coordinator writes a file of its own, as TensorBoard wants it; it reads all that are in the
//! directory as one run.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use prost::Message;

use super::{Sink, record::Record};

/// (event, its field, the tag under which TensorBoard shows it)
const SCALARS: [(&str, &str, &str); 12] = [
    ("progress", "loss", "train/loss"),
    ("progress", "learning_rate", "train/learning_rate"),
    ("progress", "images_per_second", "train/images_per_second"),
    ("epoch_finished", "train_loss", "epoch/train_loss"),
    ("validated", "val_loss", "epoch/val_loss"),
    ("validated", "val_accuracy", "epoch/val_accuracy"),
    ("validated", "val_miou", "epoch/val_miou"),
    ("validated", "val_iou_foreground", "epoch/val_iou_foreground"),
    ("validated", "val_iou_background", "epoch/val_iou_background"),
    ("validated", "val_iou_boundary", "epoch/val_iou_boundary"),
    ("checkpoint_committed", "stall_ms", "checkpoint/stall_ms"),
    ("generation_formed", "world_size", "team/size"),
];

/// `tensorflow.Event`, as far as it is used here.
#[derive(Clone, PartialEq, Message)]
struct EventRecord {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Scalar>,
}

#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, tag = "2")]
    value: f32,
}

/// A file that grows by whole records, from the first figure on: who has none to show leaves no file.
#[derive(Debug)]
pub(super) struct TensorBoard {
    dir: PathBuf,
    file: Mutex<Option<File>>,
    complained: AtomicBool,
}

impl TensorBoard {
    /// In a directory, which is created when it is needed.
    pub fn within(dir: PathBuf) -> Self {
        Self { dir, file: Mutex::new(None), complained: AtomicBool::new(false) }
    }

    fn append(&self, event: &EventRecord) -> io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if file.is_none() {
            *file = Some(create(&self.dir)?);
        }
        file.as_mut().map_or(Ok(()), |file| file.write_all(&framed(&event.encode_to_vec())))
    }
}

fn create(dir: &Path) -> io::Result<File> {
    fs::create_dir_all(dir)?;
    let micros = now().as_micros();
    let mut file = File::create_new(dir.join(format!("events.out.tfevents.{micros}.musher")))?;
    let version = EventRecord { file_version: Some("brain.Event:2".into()), ..stamped(0) };
    file.write_all(&framed(&version.encode_to_vec()))?;
    Ok(file)
}

impl Sink for TensorBoard {
    fn take(&self, record: &Record) {
        let figures = SCALARS.iter().filter(|(event, ..)| record.event() == Some(event));
        let values: Vec<_> = figures
            .filter_map(|(_, field, tag)| {
                Some(Scalar { tag: (*tag).into(), value: record.get(field)?.as_f64()? as f32 })
            })
            .collect();
        let step = record.get("step").or_else(|| record.get("applied_step")).and_then(|step| step.as_i64());
        let (Some(step), false) = (step, values.is_empty()) else { return };
        if let Err(error) = self.append(&EventRecord { summary: Some(Summary { values }), ..stamped(step) })
            && !self.complained.swap(true, Ordering::Relaxed)
        {
            let dir = self.dir.display();
            eprintln!(
                "curves are being lost, cannot write TensorBoard's file in {dir}: {error}; free some space"
            );
        }
    }
}

fn stamped(step: i64) -> EventRecord {
    EventRecord { wall_time: now().as_secs_f64(), step, file_version: None, summary: None }
}

fn now() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// A TFRecord: length, its checksum, the bytes, their checksum.
fn framed(bytes: &[u8]) -> Vec<u8> {
    let length = (bytes.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), bytes, &masked_crc(bytes)].concat()
}

/// CRC-32C, rotated and shifted, so that a checksum of data with checksums in it stays good.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_framed_as_tensorflow_frames_it() {
        // As TensorBoard's own code frames the record `musher`.
        let expected = "06000000000000007369d5376d75736865724167bb4b";
        assert_eq!(hex::encode(framed(b"musher")), expected);
    }
}
