//! Pictures of any size to the class of each of their pixels.
//!
//! The network sees a picture as in validation, stretched to its own size; its probabilities are brought back to the
//! picture's size before the likeliest class is taken, so that edges are smooth. Pixels are those of the file as
//! stored: an EXIF orientation is not applied, as it isn't in training. Which files, and what they are called, is the
//! command's.

use musher_dataset::{Picture, stretch, strip::class_colour};
use musher_model::Mode;
use tch::{Device, Kind, Tensor};

use crate::{
    train::{Input, TrainError},
    trained::Trained,
};

/// How much of the colour of its class an overlay's pixel has, the rest being the picture's.
const OVERLAY: f32 = 0.45;

pub struct Predictor {
    trained: Trained,
    input: Input,
}

/// For one picture.
pub struct Prediction {
    pub width: u32,
    pub height: u32,
    /// [height, width], row by row.
    classes: Vec<u8>,
    /// f32 [classes, height, width] in host memory; they add up to 1 over the classes.
    pub probabilities: Tensor,
}

impl Predictor {
    pub fn new(trained: Trained, device: Device) -> Result<Self, TrainError> {
        let input = Input::new(&trained.job, device)?;
        Ok(Self { trained, input })
    }

    /// All pictures in one batch.
    pub fn predict(&self, pictures: &[Picture]) -> Result<Vec<Prediction>, TrainError> {
        if pictures.is_empty() {
            return Ok(Vec::new());
        }
        let side = self.trained.job.data.image_size;
        let bytes: Vec<u8> = pictures.iter().flat_map(|picture| stretch(picture, side)).collect();
        let shape = [pictures.len() as i64, i64::from(side), i64::from(side), 3];
        let bytes = Tensor::f_from_data_size(&bytes, &shape, Kind::Uint8)?.f_to_device(self.input.device)?;
        let logits = self.trained.replica.forward(&self.input.images(&bytes)?, Mode::Eval)?;
        let probabilities = logits.f_softmax(1, Kind::Float)?;
        pictures.iter().zip(0..).map(|(picture, row)| of_picture(picture, &probabilities, row)).collect()
    }
}

/// From probabilities [N, classes, S/2, S/2] of a batch that has the picture in this row.
fn of_picture(picture: &Picture, probabilities: &Tensor, row: i64) -> Result<Prediction, TrainError> {
    let size = [i64::from(picture.height), i64::from(picture.width)];
    let probabilities = probabilities
        .f_narrow(0, row, 1)?
        .f_upsample_bilinear2d(size, false, None, None)?
        .f_squeeze_dim(0)?
        .f_to_device(Device::Cpu)?;
    let classes = probabilities.f_argmax(0, false)?.f_to_kind(Kind::Uint8)?.f_flatten(0, -1)?;
    let classes = Vec::<u8>::try_from(&classes)?;
    Ok(Prediction { width: picture.width, height: picture.height, classes, probabilities })
}

impl Prediction {
    /// An indexed PNG whose indices are the classes and whose palette has their colours.
    pub fn mask_png(&self) -> Result<Vec<u8>, png::EncodingError> {
        let palette: Vec<u8> = (0..self.class_count()).flat_map(class_colour).collect();
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_palette(palette);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.classes)?;
        writer.finish()?;
        Ok(bytes)
    }

    /// An RGB PNG: the picture, tinted by class.
    ///
    /// # Panics
    /// If it is not the picture that was predicted.
    pub fn overlay_png(&self, picture: &Picture) -> Result<Vec<u8>, png::EncodingError> {
        assert_eq!(picture.size(), (self.width, self.height));
        let mut pixels = Vec::with_capacity(picture.data.len());
        for (pixel, &class) in picture.pixels().iter().zip(&self.classes) {
            let colour = class_colour(class);
            pixels.extend(pixel.iter().zip(colour).map(|(&own, tint)| {
                (f32::from(own) * (1.0 - OVERLAY) + f32::from(tint) * OVERLAY).round() as u8
            }));
        }
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&pixels)?;
        writer.finish()?;
        Ok(bytes)
    }

    /// Of each class, the part of the picture that it takes.
    pub fn shares(&self) -> Vec<f64> {
        let mut counts = vec![0u64; usize::from(self.class_count())];
        for &class in &self.classes {
            counts[usize::from(class)] += 1;
        }
        counts.into_iter().map(|count| count as f64 / self.classes.len() as f64).collect()
    }

    fn class_count(&self) -> u8 {
        self.probabilities.size()[0] as u8
    }
}
