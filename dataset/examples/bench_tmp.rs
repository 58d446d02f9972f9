use musher_dataset::*;
fn main() {
    let source = Source { root: "/work/shared/pets".into(), train_split: "annotations/trainval.txt".into(), val_split: "annotations/test.txt".into() };
    let d = Dataset::open(&source).expect("ok");
    let view = View { transform: Transform::Augment(AugmentOptions::default()), mask_resize: MaskResize::Nearest, image_size: 224, seed: 1 };
    let t = std::time::Instant::now();
    let pairs: Vec<_> = d.train().samples.iter().map(|s| decode_pair(s, &mut |_| {}).expect("ok")).collect();
    println!("decode {:.0}/s", pairs.len() as f64 / t.elapsed().as_secs_f64());
    let (mut im, mut m) = (vec![0; view.image_bytes()], vec![0; view.mask_bytes()]);
    for _ in 0..3 {
        let t = std::time::Instant::now();
        for e in 0..5 { for (i, p) in pairs.iter().enumerate() { view.render(p, e, i as u64, &mut im, &mut m); } }
        println!("render {:.0}/s", 5.0 * pairs.len() as f64 / t.elapsed().as_secs_f64());
    }
}
