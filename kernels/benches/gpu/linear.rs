//! The four products of a layer of Llama 3.1 8B, in turn; layers have weights of their own.

use std::error::Error;

use cudarc::driver::CudaSlice;
use half::bf16;
use kernels::cuda::{LaunchError, Linear, Onto, Products};

use crate::table::Row;
use crate::timer::Timer;

/// Layers: 436 MB each, so that nothing is left in the second cache when its turn comes again.
const LAYERS: usize = 3;
/// Inputs and outputs of Q, K and V, of O, of gate and up, of down.
const SHAPES: [(u32, u32, Onto); 4] = [
    (4096, 6144, Onto::Nothing),
    (4096, 4096, Onto::Residual),
    (4096, 28_672, Onto::Nothing),
    (14_336, 4096, Onto::Residual),
];
/// Rows, and what cuBLAS takes for a layer on an H200, in microseconds.
const CASES: [(u32, Option<f64>); 13] = [
    (1, Some(133.0)),
    (2, None),
    (4, None),
    (8, None),
    (16, None),
    (32, None),
    (48, None),
    (64, Some(140.0)),
    (128, Some(146.0)),
    (256, Some(195.0)),
    (512, Some(340.0)),
    (1024, Some(657.0)),
    (8192, Some(5297.0)),
];
/// FLOP a microsecond that tensor cores of an H200 reach.
const ARITHMETIC: f64 = 790e6;

/// A product with its weights in every layer, and what goes in and out.
struct Product {
    shape: Linear,
    weights: Vec<CudaSlice<bf16>>,
    x: CudaSlice<bf16>,
    out: CudaSlice<bf16>,
}

pub(crate) fn rows(timer: &Timer) -> Result<Vec<Row>, Box<dyn Error>> {
    let shapes = SHAPES.map(|(inputs, outputs, onto)| Linear { rows: 1, inputs, outputs, onto });
    let choices = std::env::temp_dir().join("bindery-bench-choices.json");
    let mut products = Products::open(&timer.kernels, &shapes, Some(&choices))?;
    let mut layer = Vec::new();
    for shape in shapes {
        let len = shape.inputs as usize * shape.outputs as usize;
        let weights =
            (0..LAYERS as u64).map(|seed| timer.numbers(len, seed)).collect::<Result<_, _>>()?;
        layer.push(Product {
            shape,
            weights,
            x: timer.kernels.memory(1)?,
            out: timer.kernels.memory(1)?,
        });
    }
    let mut rows = Vec::new();
    for (count, rival) in CASES {
        for product in &mut layer {
            product.prepare(timer, count, &mut products)?;
        }
        let is_usable = products.stream_k.is_usable();
        for way in Way::of(count).iter().filter(|it| is_usable || !matches!(it, Way::StreamK)) {
            let name = format!("{count} rows, a layer");
            rows.push(row(timer, (*way, name), (&mut layer, &mut products), rival)?);
            for product in layer.iter_mut().filter(|_| count <= 512) {
                let name =
                    format!("{count} x {} -> {}", product.shape.inputs, product.shape.outputs);
                let one = (std::slice::from_mut(product), &mut products);
                rows.push(row(timer, (*way, name), one, None)?);
            }
        }
    }
    products.gemm.save()?;
    Ok(rows)
}

/// How a product is computed.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// As `linear` chooses.
    Chosen,
    StreamK,
    Library,
}

impl Way {
    /// Those that are held against each other.
    fn of(rows: u32) -> &'static [Self] {
        match rows {
            4..=512 => &[Self::Chosen, Self::StreamK, Self::Library],
            _ => &[Self::Chosen],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Chosen => "linear",
            Self::StreamK => "stream_k",
            Self::Library => "cublaslt",
        }
    }

    fn launch(
        self,
        timer: &Timer,
        product: &mut Product,
        index: usize,
        products: &mut Products,
    ) -> Result<(), LaunchError> {
        let Product { shape, weights, x, out } = product;
        let (kernels, given) = (&timer.kernels, (&*x, &weights[index % LAYERS]));
        match self {
            Self::Chosen => kernels.linear(shape, given, out, products),
            Self::StreamK => kernels.stream_k(shape, given, out, &mut products.stream_k),
            Self::Library => kernels.gemm(shape, given, out, &mut products.gemm),
        }
    }
}

/// Times some products, one after the other.
fn row(
    timer: &Timer,
    (way, shape): (Way, String),
    (layer, products): (&mut [Product], &mut Products),
    rival: Option<f64>,
) -> Result<Row, Box<dyn Error>> {
    let time = timer.time(4 * LAYERS, |index| {
        for product in &mut *layer {
            way.launch(timer, product, index, products)?;
        }
        Ok(())
    })?;
    let bytes: f64 = layer.iter().map(Product::bytes).sum();
    let operations: f64 = layer.iter().map(Product::operations).sum();
    let floor = layer
        .iter()
        .map(|it| (it.bytes() / timer.copy_rate / 1e3).max(it.operations() / ARITHMETIC))
        .sum();
    Ok(Row {
        operation: way.name(),
        shape,
        time,
        floor,
        rival: rival.map(|time| (time, "cuBLAS")),
        figure: format!("{:.0} GB/s, {:.0} TFLOP/s", bytes / time / 1e3, operations / time / 1e6),
    })
}

impl Product {
    /// Makes room for so many rows and has the library choose for them.
    fn prepare(
        &mut self,
        timer: &Timer,
        rows: u32,
        products: &mut Products,
    ) -> Result<(), Box<dyn Error>> {
        self.shape.rows = rows;
        self.x = timer.numbers(rows as usize * self.shape.inputs as usize, 5)?;
        self.out = timer.numbers(rows as usize * self.shape.outputs as usize, 6)?;
        if rows >= 4 {
            let weights: Vec<_> = self.weights.iter().collect();
            products.gemm.tune(&timer.kernels, &self.shape, (&self.x, &weights), &mut self.out)?;
            // What was added up again and again is no longer of the size of anything.
            self.out = timer.numbers(self.out.len(), 6)?;
        }
        Ok(())
    }

    fn bytes(&self) -> f64 {
        let [rows, inputs, outputs] =
            [self.shape.rows, self.shape.inputs, self.shape.outputs].map(f64::from);
        2.0 * (inputs * outputs + rows * (inputs + outputs))
    }

    fn operations(&self) -> f64 {
        let [rows, inputs, outputs] =
            [self.shape.rows, self.shape.inputs, self.shape.outputs].map(f64::from);
        2.0 * rows * inputs * outputs
    }
}
