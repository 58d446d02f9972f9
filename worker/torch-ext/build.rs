//! Compiles the shim against the libtorch that torch-sys found, and tells dependants where it lies.
//!
//! A binary that links libtorch needs an rpath to it, and a build script's link arguments reach only its own
//! package. So each package with binaries or tests over this crate has a build script of one line's worth:
//!
//! ```text
//! println!("cargo::rustc-link-arg=-Wl,-rpath,{}", env::var("DEP_TORCH_EXT_LIBTORCH_LIB")...);
//! ```

use std::env;
use std::path::Path;

const SOURCES: [&str; 4] = ["src/shim.cpp", "src/conv.cpp", "src/spread.cpp", "src/profile.cpp"];
const HEADERS: [&str; 3] = ["src/guarded.h", "src/columns.h", "src/products.h"];

fn main() {
    let lib = env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys exports the folder of libtorch");
    let root = Path::new(&lib).parent().expect("libtorch's libraries lie in its folder `lib`");
    let include =
        env::var_os("LIBTORCH_INCLUDE").map_or(root.join("include"), |root| Path::new(&root).join("include"));

    for file in SOURCES.into_iter().chain(HEADERS) {
        println!("cargo::rerun-if-changed={file}");
    }
    println!("cargo::rerun-if-env-changed=LIBTORCH_INCLUDE");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .flag("-isystem")
        .flag(include.to_str().expect("libtorch's path is UTF-8"))
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").to_str().expect("libtorch's path is UTF-8"))
        .files(SOURCES)
        .compile("torch_ext");

    println!("cargo::metadata=libtorch_lib={lib}");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
}
