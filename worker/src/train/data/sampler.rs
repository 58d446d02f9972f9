//! What the loader's threads do to one sample's bytes, done to a batch of tensors: the same view of the
//! same samples, to the same bytes. It draws nothing, and keeps nothing.
//!
//! The samples lie one behind the other in one tensor of whole pixels, each in its own size, so nothing is
//! padded and a border is each sample's own; `grid_sample` would want one canvas for all, and would reflect
//! at that one's border. A neighbour is one gather of four bytes: red, green, blue and the class. All
//! arithmetic is in whole numbers, as on the CPU (`musher_dataset::resample`), so a sample has the same bits
//! on every device and in every batch.

use musher_dataset::{
    Affine, MaskResize, Transform, View,
    grid::{FRACTION_BITS, Grid},
    resample::{Border, TO_NEIGHBOUR, TO_PIXEL, WEIGHT_BITS},
};
use tch::{Kind, TchError, Tensor};

use super::send;

type Result<T> = std::result::Result<T, TchError>;

/// A sample among the batch's pixels, and the view of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Where its first pixel lies.
    pub offset: i64,
    /// Width and height.
    pub size: (u32, u32),
    pub map: Affine,
}

/// Of [P] pixels, i32 of four bytes each, makes images [N, S, S, 3] i32 of 0..=255 and masks
/// [N, S/2, S/2] i64 of classes. `view`'s own map is not asked: each place has its own.
pub(super) fn sample(pixels: &Tensor, places: &[Place], view: &View) -> Result<(Tensor, Tensor)> {
    let (image, mask) = (i64::from(view.image_size), i64::from(view.mask_side()));
    let border = view.border();
    let source = Source::new(pixels, places, view)?;
    let images = source.bilinear(&IMAGE, image, border, RED..CLASS, ROUND_TO_NEAREST)?;
    let masks = match (view.mask_resize, view.transform) {
        (MaskResize::Nearest, _) => source.nearest(&MASK, mask, border)?,
        (MaskResize::Article, Transform::Stretch) => {
            source.bilinear(&MASK, mask, border, CLASS..CHANNELS, TRUNCATE)?.f_squeeze_dim(3)?
        }
        (MaskResize::Article, Transform::Augment(_)) => {
            // Between four pixels' centres all weights are equal.
            let full = source.nearest(&IMAGE, image, border)?.f_to_kind(Kind::Int)?;
            let fours = full.f_view([-1, mask, 2, mask, 2])?;
            fours.f_sum_dim_intlist([2i64, 4].as_slice(), false, Kind::Int)?.shift_right(2)?
        }
    };
    Ok((images, masks.f_to_kind(Kind::Int64)?))
}

/// Of a pixel's four bytes.
const RED: i64 = 0;
const CLASS: i64 = 3;
const CHANNELS: i64 = 4;

/// Added before a blend's weights are divided out.
const ROUND_TO_NEAREST: i64 = 1 << (2 * WEIGHT_BITS - 1);
const TRUNCATE: i64 = 0;

/// What is known of a sample, by columns of one table: where its pixels are, then its grids.
const OFFSET: i64 = 0;
const WIDTH: i64 = 1;
const HEIGHT: i64 = 2;
const IMAGE: GridColumns = GridColumns(3);
const MASK: GridColumns = GridColumns(9);
const COLUMNS: usize = 15;

/// A grid's first column of six: start, step across and step down, x and y each.
struct GridColumns(i64);

#[derive(Clone, Copy)]
enum Axis {
    X,
    Y,
}

struct Source<'a> {
    pixels: &'a Tensor,
    /// [N, COLUMNS] i64.
    table: Tensor,
}

impl<'a> Source<'a> {
    fn new(pixels: &'a Tensor, places: &[Place], view: &View) -> Result<Self> {
        let rows: Vec<i64> = places.iter().flat_map(|place| place.row(view)).collect();
        let table = Tensor::f_from_slice(&rows)?.f_view([places.len() as i64, COLUMNS as i64])?;
        Ok(Self { pixels, table: send(&table, pixels.device())? })
    }

    /// One of the table's columns, [N, 1, 1].
    fn column(&self, index: i64) -> Result<Tensor> {
        self.table.f_select(1, index)?.f_view([-1, 1, 1])
    }

    /// One coordinate of all the output's centres, `offset` further, in the grid's fixed point: [N, side, side].
    fn coordinate(&self, grid: &GridColumns, axis: Axis, side: i64, offset: i64) -> Result<Tensor> {
        let [start, across, down] = [0, 2, 4].map(|column| self.column(grid.0 + column + axis as i64));
        let steps = Tensor::f_arange(side, (Kind::Int64, self.table.device()))?;
        let columns = across?.f_mul(&steps)?;
        let rows = down?.f_mul(&steps.f_view([side, 1])?)?.f_add(&start?.f_add_scalar(offset)?)?;
        rows.f_add(&columns)
    }

    /// The class under each centre, u8.
    fn nearest(&self, grid: &GridColumns, side: i64, border: Border) -> Result<Tensor> {
        let [x, y] = [Axis::X, Axis::Y].map(|axis| {
            let whole = self.coordinate(grid, axis, side, TO_PIXEL)?.whole()?;
            self.inside(&whole, axis, border)
        });
        bytes(&self.at(&x?, &self.row(&y?)?)?, CLASS..CHANNELS)?.f_squeeze_dim(3)
    }

    /// The channels' blend of four neighbours, [N, side, side, channels] i32.
    fn bilinear(
        &self,
        grid: &GridColumns,
        side: i64,
        border: Border,
        channels: std::ops::Range<i64>,
        bias: i64,
    ) -> Result<Tensor> {
        let x = Neighbours::new(self, grid, Axis::X, side, border)?;
        let y = Neighbours::new(self, grid, Axis::Y, side, border)?;
        let (upper, lower) = (self.row(&y.first)?, self.row(&y.second)?);

        const UNIT: i64 = 1 << WEIGHT_BITS;
        let both = x.weight.f_mul(&y.weight)?;
        let right = x.weight.f_mul_scalar(UNIT)?.f_sub(&both)?;
        let down = y.weight.f_mul_scalar(UNIT)?.f_sub(&both)?;
        let neither = both.f_add(&right)?.f_add(&down)?.f_rsub_scalar(UNIT * UNIT)?;

        let part = |x, row, weight: &Tensor| {
            bytes(&self.at(x, row)?, channels.clone())?.f_mul(&weight.f_unsqueeze(3)?)
        };
        let mut sum = part(&x.first, &upper, &neither)?;
        for (x, row, weight) in
            [(&x.second, &upper, &right), (&x.first, &lower, &down), (&x.second, &lower, &both)]
        {
            sum = sum.f_add_(&part(x, row, weight)?)?;
        }
        sum.f_add_scalar_(bias)?.shift_right(2 * i64::from(WEIGHT_BITS))
    }

    /// The pixels that stand for those at `whole` along an axis.
    fn inside(&self, whole: &Tensor, axis: Axis, border: Border) -> Result<Tensor> {
        let length = match axis {
            Axis::X => WIDTH,
            Axis::Y => HEIGHT,
        };
        let last = self.column(length)?.f_to_kind(Kind::Int)?.f_sub_scalar(1)?;
        match border {
            Border::Replicate => whole.f_clamp_min(0)?.f_minimum(&last),
            Border::Reflect101 => {
                let period = last.f_mul_scalar(2)?;
                let folded = whole.f_remainder_tensor(&period.f_clamp_min(1)?)?;
                folded.f_minimum(&period.f_sub(&folded)?)
            }
        }
    }

    /// Where the rows begin.
    fn row(&self, y: &Tensor) -> Result<Tensor> {
        y.f_mul(&self.column(WIDTH)?)?.f_add(&self.column(OFFSET)?)
    }

    fn at(&self, x: &Tensor, row: &Tensor) -> Result<Tensor> {
        self.pixels.f_take(&row.f_add(x)?)
    }
}

/// Along one axis, the two pixels that each centre lies between, and the second one's weight in i32.
struct Neighbours {
    first: Tensor,
    second: Tensor,
    weight: Tensor,
}

impl Neighbours {
    fn new(source: &Source, grid: &GridColumns, axis: Axis, side: i64, border: Border) -> Result<Self> {
        let coordinate = source.coordinate(grid, axis, side, TO_NEIGHBOUR)?;
        let whole = coordinate.whole()?;
        let weight = coordinate.shift_right(i64::from(FRACTION_BITS - WEIGHT_BITS))?;
        Ok(Self {
            first: source.inside(&whole, axis, border)?,
            second: source.inside(&whole.f_add_scalar(1)?, axis, border)?,
            weight: weight.f_bitwise_and((1i64 << WEIGHT_BITS) - 1)?.f_to_kind(Kind::Int)?,
        })
    }
}

impl Place {
    fn row(&self, view: &View) -> [i64; COLUMNS] {
        let [image, mask] = [view.image_size, view.mask_side()].map(|side| {
            let Grid { start, across, down } = Grid::new(&self.map, side);
            [start, across, down]
        });
        let mut row = [0; COLUMNS];
        row[..3].copy_from_slice(&[self.offset, i64::from(self.size.0), i64::from(self.size.1)]);
        row[3..9].copy_from_slice(image.as_flattened());
        row[9..].copy_from_slice(mask.as_flattened());
        row
    }
}

/// Some of each pixel's bytes, [N, side, side] to [N, side, side, channels] u8.
fn bytes(pixels: &Tensor, channels: std::ops::Range<i64>) -> Result<Tensor> {
    let whole = pixels.f_unsqueeze(3)?.f_view_dtype(Kind::Uint8)?;
    whole.f_narrow(3, channels.start, channels.end - channels.start)
}

/// Of whole numbers.
trait Shift {
    fn shift_right(&self, bits: i64) -> Result<Tensor>;
    /// What a fixed-point number counts in full, as i32.
    fn whole(&self) -> Result<Tensor>;
}

impl Shift for Tensor {
    fn shift_right(&self, bits: i64) -> Result<Tensor> {
        self.f_bitwise_right_shift_tensor_scalar(bits)
    }

    fn whole(&self) -> Result<Tensor> {
        self.shift_right(i64::from(FRACTION_BITS))?.f_to_kind(Kind::Int)
    }
}
