//! Lets this package's tests and examples find libtorch; see torch-ext's build script.

fn main() {
    let lib = std::env::var("DEP_TORCH_EXT_LIBTORCH_LIB").expect("torch-ext exports the folder of libtorch");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg=-Wl,-rpath,{lib}");
}
