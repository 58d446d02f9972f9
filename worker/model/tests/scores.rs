//! Validation's figures against scikit-learn's (`tools/judgement_reference.py`).

#![allow(clippy::unwrap_used)]

use musher_model::metrics;
use musher_proto::{message::UnitResult, scores};
use serde_json::Value;
use tch::Tensor;

const CASES: &str = include_str!("reference/scores.json");

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn close(found: f64, expected: f64) -> bool {
    (found - expected).abs() < 1e-6
}

#[test]
fn loss_accuracy_iou_and_dice_are_scikit_learns() {
    let cases: Vec<Value> = serde_json::from_str(CASES).unwrap();
    assert_eq!(cases.len(), 3);
    for case in &cases {
        let shape: Vec<_> = numbers(&case["shape"]).iter().map(|&len| len as i64).collect();
        let logits: Vec<_> = numbers(&case["logits"]).iter().map(|&logit| logit as f32).collect();
        let masks: Vec<_> = numbers(&case["masks"]).iter().map(|&class| class as i64).collect();
        let logits = Tensor::from_slice(&logits).view(shape.as_slice());
        let masks = Tensor::from_slice(&masks).view([shape[0], shape[2], shape[3]]);

        // Sample by sample, as ranks would evaluate them.
        let units: Vec<_> = (0..shape[0])
            .map(|sample| {
                let found =
                    metrics::evaluate(&logits.narrow(0, sample, 1), &masks.narrow(0, sample, 1)).unwrap();
                let (loss_sum, confusion) = (found.loss_sum, found.confusion.counts);
                UnitResult { index: sample as u64, samples: 1, loss_sum, confusion }
            })
            .collect();
        let scores = scores::aggregate(&units, shape[0] as u64, shape[1] as usize).unwrap();

        let confusion = metrics::evaluate(&logits, &masks).unwrap().confusion.counts;
        assert_eq!(
            confusion.iter().map(|&count| count as f64).collect::<Vec<_>>(),
            numbers(&case["confusion"])
        );
        assert!(close(scores.loss, case["loss"].as_f64().unwrap()), "{scores:?}");
        assert!(close(scores.accuracy, case["accuracy"].as_f64().unwrap()), "{scores:?}");
        assert!(close(scores.miou, case["miou"].as_f64().unwrap()), "{scores:?}");
        let (iou, dice) = (numbers(&case["iou"]), numbers(&case["dice"]));
        for (class, found) in scores.class_iou.into_iter().enumerate() {
            assert_eq!(found.is_some(), class < iou.len(), "class {class} occurs or not");
            let Some(found) = found else { continue };
            assert!(close(found, iou[class]), "class {class}: {found} is not {}", iou[class]);
            assert!(close(2.0 * found / (1.0 + found), dice[class]), "class {class}'s Dice");
        }
    }
}
