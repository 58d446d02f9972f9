//! The Oxford-IIIT Pet layout, unpacked or in tar shards: split lists, decoding with the real data's defects, a cache
//! of decoded pairs, augmentation, loading ahead of the trainer, checking, a synthetic data set and
//! the picture strip.
//!
//! Everything here is bytes on the CPU: no tensors, no normalization to floats, no network and no
//! wire types. Where the data comes from and which samples make a batch is decided elsewhere.

mod error;
pub use error::{DataWarning, DatasetError, Warnings};

mod held_out;
pub use held_out::HeldOut;

mod sample;
pub use sample::Sample;

mod layout;
pub use layout::{Dataset, Source, Split};

mod packed;
pub use packed::{Directory, DiskCacheOptions, PackOptions, Packing, Store, pack, reach};

mod raster;
pub use raster::{Mask, Pair, Picture, Raster};

mod decode;
pub use decode::{decode_mask, decode_pair, decode_picture, is_named_as_picture, is_picture};

mod cache;
pub use cache::{CacheCounters, ImageCache};

mod affine;
pub use affine::Affine;

pub mod grid;

mod augment;
pub use augment::{AugmentOptions, Crop, Draw};

pub mod resample;

mod view;
pub use view::{MaskResize, Transform, View, stretch};

mod read_ahead;

mod pipeline;
pub use pipeline::BatchPlan;

mod loader;
pub use loader::{Batch, Loader, LoaderOptions};

mod decoder;
pub use decoder::{Decoded, Decoder, DecoderOptions};

pub mod check;
pub mod strip;
pub mod synth;

/// Names of the classes by index: a trimap's value minus one.
pub const CLASS_NAMES: [&str; CLASSES] = ["foreground", "background", "boundary"];

/// How many classes a trimap tells apart.
pub const CLASSES: usize = 3;
