//! Lists the arrays of weights files: name, shape, type, and the sum of the elements.

use std::path::Path;

use musher_weights::{Dtype, Error, WeightsFile};

fn main() -> Result<(), Error> {
    for file in std::env::args().skip(1) {
        list(Path::new(&file))?;
    }
    Ok(())
}

fn list(path: &Path) -> Result<(), Error> {
    let mut file = WeightsFile::open(path)?;
    println!("{}: {:?}, {} arrays", path.display(), file.format(), file.tensors().len());
    for (name, stored) in file.tensors().clone() {
        let sum = match stored.dtype() {
            Dtype::Other(_) => "not read".to_owned(),
            _ => format!("{:.6}", file.read(&stored)?.into_iter().map(f64::from).sum::<f64>()),
        };
        println!("  {name} {:?} {:?}, sum {sum}", stored.shape(), stored.dtype());
    }
    Ok(())
}
