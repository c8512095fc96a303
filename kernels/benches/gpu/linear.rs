//! The four products of a layer of Llama 3.1 8B, in turn; layers have weights of their own.

use std::error::Error;

use cudarc::driver::CudaSlice;
use half::bf16;
use kernels::cuda::{Gate, GateActivation, Kernels, Linear, Onto, Products, Way};

use crate::table::Row;
use crate::timer::{Captured, Timer};

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
        rows.extend(both(timer, (&mut layer, &mut products), rival)?);
        if count <= 1024 {
            rows.push(gated(timer, &mut layer[2], &mut products)?);
        }
        for product in layer.iter_mut().filter(|_| (2..=512).contains(&count)) {
            rows.extend(both(timer, (std::slice::from_mut(product), &mut products), None)?);
        }
    }
    products.save()?;
    Ok(rows)
}

/// Some products, one after the other, by the ways that are chosen and by the library's fastest.
fn both(
    timer: &Timer,
    (layer, products): (&mut [Product], &mut Products),
    rival: Option<f64>,
) -> Result<[Row; 2], Box<dyn Error>> {
    let ours = layer.iter().map(|it| products.way::<bf16>(&it.shape));
    let ours: Vec<_> = ours.collect::<Result<_, _>>()?;
    let library = layer.iter_mut().map(|it| it.fastest_of_library(timer, products));
    let library: Vec<_> = library.collect::<Result<_, _>>()?;
    let graphs =
        [captured(timer, &ours, (layer, products))?, captured(timer, &library, (layer, products))?];
    let times = timer.in_turns(graphs.each_ref())?;
    Ok([
        row(timer, ("linear", &ours), layer, (times[0], rival)),
        row(timer, ("cublaslt", &library), layer, (times[1], rival)),
    ])
}

fn captured(
    timer: &Timer,
    ways: &[Way],
    (layer, products): (&mut [Product], &mut Products),
) -> Result<Captured, Box<dyn Error>> {
    timer.captured(4 * LAYERS, |index| {
        for (product, way) in layer.iter_mut().zip(ways) {
            product.launch(&timer.kernels, (index, *way), products)?;
        }
        Ok(())
    })
}

fn row(
    timer: &Timer,
    (operation, ways): (&'static str, &[Way]),
    layer: &[Product],
    (time, rival): (f64, Option<f64>),
) -> Row {
    let bytes: f64 = layer.iter().map(|it| bytes(&it.shape)).sum();
    let operations: f64 = layer.iter().map(|it| operations(&it.shape)).sum();
    let floor = layer.iter().map(|it| floor(&it.shape, timer)).sum();
    let shape = layer[0].shape;
    let shape = match layer {
        [_] => format!("{} x {} -> {}", shape.rows, shape.inputs, shape.outputs),
        _ => format!("{} rows, a layer", shape.rows),
    };
    let ways: Vec<_> = ways.iter().map(Way::to_string).collect();
    let rates = format!("{:.0} GB/s, {:.0} TFLOP/s", bytes / time / 1e3, operations / time / 1e6);
    let figure = format!("{rates}, {}", ways.join(", "));
    Row { operation, shape, time, floor, rival: rival.map(|time| (time, "cuBLAS")), figure }
}

/// The gate in the product's launch, against a launch of its own.
fn gated(
    timer: &Timer,
    product: &mut Product,
    products: &mut Products,
) -> Result<Row, Box<dyn Error>> {
    let (kernels, plain) = (&timer.kernels, product.shape);
    let activation = GateActivation::Silu;
    let shape = Linear { outputs: plain.outputs / 2, onto: Onto::Gate(activation), ..plain };
    let gate = Gate { rows: plain.rows, width: shape.outputs, activation };
    let mut out = kernels.memory(shape.rows as usize * shape.outputs as usize)?;
    let Product { weights, x, out: both, .. } = product;
    let all: Vec<_> = weights.iter().collect();
    products.tune(kernels, &shape, (x, &all), &mut out)?;
    let apart = timer.captured(4 * LAYERS, |index| {
        kernels.linear(&plain, (x, &weights[index % LAYERS]), both, products)?;
        Ok(kernels.gate(&gate, both, &mut out)?)
    })?;
    let together = timer.captured(4 * LAYERS, |index| {
        Ok(kernels.linear(&shape, (x, &weights[index % LAYERS]), &mut out, products)?)
    })?;
    let [apart, time] = timer.in_turns([&apart, &together])?;
    Ok(Row {
        operation: "linear",
        shape: format!("{} rows, gate and up with SiLU", shape.rows),
        time,
        floor: floor(&shape, timer),
        rival: Some((apart, "two launches")),
        figure: products.way::<bf16>(&shape)?.to_string(),
    })
}

impl Product {
    /// Makes room for so many rows and finds the fastest way for them.
    fn prepare(
        &mut self,
        timer: &Timer,
        rows: u32,
        products: &mut Products,
    ) -> Result<(), Box<dyn Error>> {
        self.shape.rows = rows;
        self.x = timer.numbers(rows as usize * self.shape.inputs as usize, 5)?;
        self.out = timer.numbers(rows as usize * self.shape.outputs as usize, 6)?;
        let weights: Vec<_> = self.weights.iter().collect();
        products.tune(&timer.kernels, &self.shape, (&self.x, &weights), &mut self.out)?;
        // What was added up again and again is no longer of the size of anything.
        self.out = timer.numbers(self.out.len(), 6)?;
        Ok(())
    }

    fn launch(
        &mut self,
        kernels: &Kernels,
        (index, way): (usize, Way),
        products: &mut Products,
    ) -> Result<(), Box<dyn Error>> {
        let given = (&self.x, &self.weights[index % LAYERS]);
        Ok(kernels.linear_by(way, &self.shape, given, &mut self.out, products)?)
    }

    fn fastest_of_library(
        &mut self,
        timer: &Timer,
        products: &mut Products,
    ) -> Result<Way, Box<dyn Error>> {
        let ways = products.ways::<bf16>(&self.shape)?.into_iter().filter(Way::is_library);
        let (ways, weights): (Vec<_>, Vec<_>) = (ways.collect(), self.weights.iter().collect());
        let given = (&self.x, weights.as_slice());
        Ok(products.fastest(&timer.kernels, (&self.shape, &ways), given, &mut self.out)?)
    }
}

fn floor(shape: &Linear, timer: &Timer) -> f64 {
    (bytes(shape) / timer.copy_rate / 1e3).max(operations(shape) / ARITHMETIC)
}

fn bytes(shape: &Linear) -> f64 {
    let [rows, inputs, outputs, w_rows] =
        [shape.rows, shape.inputs, shape.outputs, shape.w_rows()].map(f64::from);
    2.0 * (inputs * w_rows + rows * (inputs + outputs))
}

fn operations(shape: &Linear) -> f64 {
    2.0 * f64::from(shape.rows) * f64::from(shape.inputs) * f64::from(shape.w_rows())
}
