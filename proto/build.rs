//! Compiles `musher/v1/*.proto` with a Rust protobuf compiler, so that no `protoc` is needed.

use std::{env, fs, path::PathBuf};

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=musher");
    let files = ["musher/v1/training.proto", "musher/v1/checkpoints.proto", "musher/v1/control.proto"];
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("musher.v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".musher.v1.Chunk")
        .codec_path("crate::codec::Frugal")
        .compile_fds(descriptors)?;
    Ok(())
}
