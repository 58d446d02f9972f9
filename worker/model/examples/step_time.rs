//! Times the parts of a training step on random data and prints them as a JSON line, in milliseconds (the least of all steps).
//!
//! `cargo run --release -p musher-model --example step_time -- [WIDTH] [IMAGE_SIZE] [BATCH] [THREADS] [STEPS]`

use std::time::Instant;

use musher_model::{Error, Mode, ModelOptions, Replica};
use tch::{Device, Kind, Tensor};

const PARTS: [&str; 6] = ["zero", "forward", "backward", "finite", "adam", "whole"];
const WARM_UP: usize = 2;

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument =
        |index: usize, default: f64| arguments.get(index).and_then(|a| a.parse().ok()).unwrap_or(default);
    let image_size = argument(1, 64.0) as usize;
    let (batch, steps) = (argument(2, 16.0) as i64, argument(4, 8.0) as usize);
    tch::set_num_threads(argument(3, 1.0) as i32);

    let options = ModelOptions { width: argument(0, 1.0), image_size, ..ModelOptions::default() };
    let mut replica = Replica::new(&options, 0, Device::Cpu)?;
    let (size, cpu) = (image_size as i64, Device::Cpu);
    let images = Tensor::rand([batch, size, size, 3], (Kind::Float, cpu)).permute([0, 3, 1, 2]);
    let masks = Tensor::randint(3, [batch, size / 2, size / 2], (Kind::Int64, cpu));

    let mut times = PARTS.map(|_| Vec::new());
    for step in 0..WARM_UP + steps {
        let mut marks = vec![Instant::now()];
        replica.begin_step()?;
        replica.zero_gradients()?;
        marks.push(Instant::now());
        let logits = replica.forward(&images, Mode::Train)?;
        marks.push(Instant::now());
        let _ = replica.backward_last(&logits, &masks, 1.0 / masks.numel() as f64, |_| ())?;
        drop(logits);
        marks.push(Instant::now());
        let applies = replica.measure_gradients(None)?.finite.f_to_kind(Kind::Float)?.f_view([1])?;
        marks.push(Instant::now());
        replica.update(1e-3, &applies, None)?;
        replica.settle(applies.f_double_value(&[0])? == 1.0);
        marks.push(Instant::now());
        if step >= WARM_UP {
            let parts = marks.windows(2).map(|pair| pair[1] - pair[0]).chain([marks[5] - marks[0]]);
            times.iter_mut().zip(parts).for_each(|(times, part)| times.push(part.as_secs_f64() * 1e3));
        }
    }
    let least = PARTS.iter().zip(&mut times).map(|(part, times)| {
        times.sort_by(f64::total_cmp);
        format!("\"{part}\":{:.1}", times[0])
    });
    println!("{{{}}}", least.collect::<Vec<_>>().join(","));
    Ok(())
}
