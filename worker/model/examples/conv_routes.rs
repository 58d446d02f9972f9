//! Times the two ways to convolve on a CPU, a product of matrices and oneDNN's kernels, forward and backward, for the
//! network's layers at full width: what the choice in `layers.rs` goes by. Milliseconds, the least of all repetitions.
//!
//! `cargo run --release -p musher-model --example conv_routes -- [IMAGE_SIZE] [BATCH] [REPETITIONS]`

use std::time::Instant;

use tch::{Device, Kind, Tensor};
use torch_ext::{Factors, Join};

/// Kernel, inputs, outputs, and how often the image was halved.
const LAYERS: [(i64, i64, i64, u32); 17] = [
    (1, 64, 256, 2),
    (1, 256, 64, 2),
    (3, 64, 64, 2),
    (1, 128, 512, 3),
    (1, 512, 128, 3),
    (3, 128, 128, 3),
    (1, 256, 1024, 4),
    (1, 1024, 256, 4),
    (3, 256, 256, 4),
    (1, 512, 2048, 5),
    (1, 2048, 512, 5),
    (3, 512, 512, 5),
    (3, 1024, 1024, 4),
    (3, 512, 512, 3),
    (3, 256, 256, 2),
    (3, 64, 64, 1),
    (1, 2048, 1024, 5),
];
/// Channels up, of the skip and out, and how often the image was halved, for the decoder's joins.
const JOINS: [(i64, i64, i64, u32); 4] =
    [(1024, 1024, 1024, 4), (512, 512, 512, 3), (256, 256, 256, 2), (64, 64, 64, 1)];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<i64> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let argument = |index: usize, default| arguments.get(index).copied().unwrap_or(default);
    let (size, batch, repetitions) = (argument(0, 64), argument(1, 8), argument(2, 5));
    tch::set_num_threads(1);
    let random = |size: &[i64]| Tensor::rand(size, (Kind::Float, Device::Cpu)) - 0.5;
    let leaf = |size: [i64; 4]| {
        let [o, c, k, _] = size;
        let weight = random(&[o, k, k, c]).permute([0, 3, 1, 2]).detach().set_requires_grad(true);
        torch_ext::set_grad(&weight, &Tensor::zeros_like(&weight).detach())?;
        Ok::<_, torch_ext::Error>(weight)
    };
    let least = |ways: &[&dyn Fn() -> Result<Tensor, torch_ext::Error>]| {
        let mut least = vec![f64::INFINITY; ways.len()];
        for _ in 0..repetitions {
            for (least, way) in least.iter_mut().zip(ways) {
                let start = Instant::now();
                let y = way()?;
                (&y * y.detach()).sum(Kind::Float).backward();
                *least = least.min(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        Ok::<_, torch_ext::Error>(least)
    };
    for (kernel, inputs, outputs, halvings) in LAYERS {
        let side = size >> halvings;
        let x = random(&[batch, inputs, side, side]).set_requires_grad(true);
        let weight = leaf([outputs, inputs, kernel, kernel])?;
        let direct = || Ok(x.conv2d(&torch_ext::row_major(&weight)?, None::<&Tensor>, 1, kernel / 2, 1, 1));
        let product = |factors| torch_ext::conv_as_product(&x, &weight, None, factors);
        let times = least(&[&direct, &|| product(Factors::F32), &|| product(Factors::Bf16)])?;
        let pixels_per_channel = (batch * side * side) as f64 / inputs as f64;
        println!(
            "{kernel}x{kernel} {inputs:4} -> {outputs:4} {side:3}: oneDNN {:7.2}  product {:7.2}  {:.2} ({pixels_per_channel:.2})  of bf16 {:7.2}",
            times[0],
            times[1],
            times[0] / times[1],
            times[2],
        );
    }
    for (up, skips, outputs, halvings) in JOINS {
        let side = size >> halvings;
        let grad = |size: &[i64]| random(size).set_requires_grad(true);
        let (sparse, constant) = (grad(&[batch, up, side / 2, side / 2]), grad(&[up]));
        let (skip, bias) = (grad(&[batch, skips, side, side]), grad(&[outputs]));
        let weight = leaf([outputs, up + skips, 3, 3])?;
        let dense = grad(&[batch, up, side, side]);
        let direct = || {
            let x = Tensor::cat(&[&dense, &skip], 1);
            Ok(x.conv2d(&torch_ext::row_major(&weight)?, Some(&bias), 1, 1, 1, 1))
        };
        let join = |by_product, factors| {
            let join = Join { sparse: &sparse, constant: &constant, skip: &skip };
            torch_ext::conv_of_join(join, &weight, &bias, by_product, factors)
        };
        let f32 = |by_product| join(by_product, Factors::F32);
        let times = least(&[&direct, &|| f32(false), &|| f32(true), &|| join(true, Factors::Bf16)])?;
        println!(
            "join {up:4} + {skips:4} -> {outputs:4} {side:3}: dense {:7.2}  skip by oneDNN {:7.2}  by product {:7.2}  {:.2}  of bf16 {:7.2}",
            times[0],
            times[1],
            times[2],
            times[0] / times[1].min(times[2]),
            times[3],
        );
    }
    Ok(())
}
