//! Measures the ring over loopback: the gradients of a network of 63.5 M parameters, all-reduced in
//! buckets, by ranks that are processes of their own.
//!
//! `cargo run --release -p musher-collective --example ring_bench -- [WORLD] [MEGABYTES] [BUCKET_MB]`

use std::{
    env,
    error::Error,
    io::{BufRead, BufReader, Write},
    net::{Ipv4Addr, SocketAddr},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use musher_collective::{Aborter, Collective, Phase, Purpose, Ring, RingListener, RingSpec, Secret, Tag};

const ROUNDS: u64 = 20;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == "--rank") {
        return member(&args[1..]);
    }
    let number = |i: usize, default: usize| args.get(i).map_or(Ok(default), |a| a.parse());
    let (world, megabytes, bucket) = (number(0, 2)?, number(1, 254)?, number(2, 25)?);

    // Each member prints its address; the roster goes back to all.
    let mut members = (0..world)
        .map(|rank| {
            Command::new(env::current_exe()?)
                .args(["--rank", &rank.to_string(), &megabytes.to_string(), &bucket.to_string()])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
        })
        .collect::<Result<Vec<Child>, _>>()?;
    let mut outputs = Vec::new();
    let mut roster = String::new();
    for member in &mut members {
        let mut output = BufReader::new(member.stdout.take().ok_or("a member has no stdout")?);
        let mut address = String::new();
        output.read_line(&mut address)?;
        roster = format!("{roster} {}", address.trim());
        outputs.push(output);
    }
    for member in &mut members {
        writeln!(member.stdin.take().ok_or("a member has no stdin")?, "{roster}")?;
    }
    for output in outputs {
        output.lines().try_for_each(|line| line.map(|line| println!("{line}")))?;
    }
    for mut member in members {
        member.wait()?;
    }
    Ok(())
}

fn member(args: &[String]) -> Result<(), Box<dyn Error>> {
    let [rank, megabytes, bucket] = args else { return Err("usage: --rank RANK MB BUCKET_MB".into()) };
    let (rank, megabytes, bucket): (u32, usize, usize) = (rank.parse()?, megabytes.parse()?, bucket.parse()?);

    let listener = RingListener::bind((Ipv4Addr::LOCALHOST, 0).into())?;
    println!("{}", listener.local_addr()?);
    let mut roster = String::new();
    std::io::stdin().read_line(&mut roster)?;
    let addresses = roster.split_whitespace().map(str::parse).collect::<Result<Vec<SocketAddr>, _>>()?;
    let spec = RingSpec {
        generation: 1,
        purpose: Purpose::Steps,
        rank,
        world: addresses.len() as u32,
        successor: addresses[(rank as usize + 1) % addresses.len()],
        secret: Secret([7; 32]),
        patience: Duration::from_secs(10),
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut ring = listener.form(&spec, deadline, &Aborter::new()?)?;

    let mut data = vec![0.5f32; megabytes * 1_000_000 / 4];
    let bucket = bucket * 1_000_000 / 4;
    let sweep = measure(&mut ring, |ring, step| {
        data.chunks_mut(bucket)
            .zip(0..)
            .try_for_each(|(part, index)| ring.all_reduce(Tag::new(step, index, Phase::Gradients), part))
    })?;
    let mut word = [1.0f64; 4];
    let word = measure(&mut ring, |ring, step| {
        word.fill(1.0);
        (0..50).try_for_each(|i| ring.all_reduce_f64(Tag::new(step, i, Phase::Control), &mut word))
    })?;
    let mut state: Vec<u8> = vec![1; megabytes * 1_000_000];
    let broadcast =
        measure(&mut ring, |ring, step| ring.broadcast(Tag::new(step, 0, Phase::State), 0, &mut state))?;
    if rank == 0 {
        let rate = |time: Duration| megabytes as f64 / 1e3 / time.as_secs_f64();
        println!("world {}, {megabytes} MB, median of {ROUNDS}:", ring.world());
        println!("all-reduce   {:6.1} ms  {:.2} GB/s", millis(sweep), rate(sweep));
        println!("broadcast    {:6.1} ms  {:.2} GB/s", millis(broadcast), rate(broadcast));
        println!("control word {:6.1} us", millis(word) * 1e3 / 50.0);
    }
    Ok(())
}

/// The median time of one `run`, which gets a step number of its own each time.
fn measure<E>(ring: &mut Ring, mut run: impl FnMut(&mut Ring, u64) -> Result<(), E>) -> Result<Duration, E> {
    run(ring, 0)?;
    let mut times = Vec::new();
    for step in 1..=ROUNDS {
        let started = Instant::now();
        run(ring, step)?;
        times.push(started.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2])
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
