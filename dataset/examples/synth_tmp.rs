fn main() {
    let root = std::env::args().nth(1).expect("dir");
    let t = std::time::Instant::now();
    let r = musher_dataset::synth::draw(root.as_ref(), &Default::default());
    println!("{r:?} {:?}", t.elapsed());
    let source = musher_dataset::Source { root: root.into(), train_split: "annotations/trainval.txt".into(), val_split: "annotations/test.txt".into() };
    println!("{}", musher_dataset::check::check(&source).expect("ok"));
}
