//! Runs beside each other: what their event files tell, as curves, as a table and as a page.
//!
//! Nothing here writes a file or needs a run to have ended; what is not there yet is left out.

mod chart;
mod history;
mod page;
mod table;

pub use chart::png;
pub use history::{HistoryError, RunHistory};
pub use page::html;
pub use table::{as_json, as_text};

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{fs, path::Path};

    use musher_dataset::strip::{self, StripRow};

    use super::*;

    /// A run of as many epochs as there are losses, the best being the lowest.
    fn run(dir: &Path, label: &str, losses: &[f64]) -> RunHistory {
        let dir = dir.join(label).join(losses.len().to_string());
        fs::create_dir_all(dir.join("samples")).unwrap();
        let mut events = String::from("{\"timestamp\":\"2026-01-01T00:00:00Z\",\"event\":\"run_started\"}\n");
        for (epoch, loss) in (1..).zip(losses) {
            let line = serde_json::json!({
                "timestamp": format!("2026-01-01T00:00:{epoch:02}Z"), "event": "validated", "epoch": epoch,
                "val_loss": loss, "val_accuracy": 1.0 - loss, "val_miou": 0.5, "val_iou_foreground": 0.25,
            });
            events += &format!("{line}\n");
        }
        events += "{\"event\":\"run_finished\",\"stopped\":\"early\",\"status\":\"finished\"}\n";
        fs::write(dir.join("events.jsonl"), events).unwrap();
        let row =
            StripRow { image: vec![9; 64 * 64 * 3], truth: vec![0; 32 * 32], predicted: vec![1; 32 * 32] };
        fs::write(dir.join("samples/best.png"), strip::render(&[row.clone(), row], 64)).unwrap();
        RunHistory::read(&dir, label.into()).unwrap()
    }

    fn runs() -> Vec<RunHistory> {
        let dir = tempfile::tempdir().unwrap();
        [("a<b", &[0.6, 0.5, 0.7][..]), ("c", &[0.4, 0.3]), ("c", &[0.5, 0.4, 0.3, 0.1])]
            .map(|(label, losses)| run(dir.path(), label, losses))
            .into()
    }

    #[test]
    fn the_table_has_each_run_and_each_kinds_mean() {
        let runs = runs();
        let json = as_json(&runs);
        let first = &json["runs"][0];
        assert_eq!(
            (&first["best_epoch"], &first["epochs"], &first["ended"]),
            (&2.into(), &3.into(), &"early".into())
        );
        assert_eq!((&first["val_loss"], &first["seconds"]), (&0.5.into(), &3.0.into()));
        assert_eq!((&first["val_iou_foreground"], &first["val_iou_boundary"]), (&0.25.into(), &().into()));
        let text = as_text(&runs);
        assert_eq!(text.lines().count(), 5, "{text}");
        // Of 0.3 and 0.1: the deviation of a sample.
        assert!(text.lines().last().unwrap().contains("0.2000 ± 0.1414"), "{text}");
    }

    #[test]
    fn the_picture_has_each_kinds_colour() {
        let picture = image::load_from_memory(&png(&runs())).unwrap().into_rgb8();
        assert_eq!(picture.dimensions(), (1600, 720));
        for colour in [[0, 114, 178], [213, 94, 0]] {
            assert!(picture.pixels().filter(|pixel| pixel.0 == colour).count() > 100, "{colour:?}");
        }
    }

    #[test]
    fn the_page_needs_nothing_beside_it() {
        let page = html(&runs());
        assert!(!page.contains("a<b") && page.contains("a&lt;b"), "labels are escaped");
        assert_eq!(page.matches("<svg").count(), 2, "curves for light and for dark paper");
        // Two rows of image, truth and two kinds' predictions.
        assert_eq!(page.matches("src=\"data:image/png;base64,").count(), 8);
        assert!(!page.contains("src=\"http") && !page.contains("href="), "nothing is fetched");
    }
}
