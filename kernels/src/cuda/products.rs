//! The ways to a product, and which is the fastest for a shape.
//!
//! [`Products::tune`] times the ways to a shape once and keeps the best, in a file too. A shape that was not timed takes the one that
//! should be fastest.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use cudarc::driver::{CudaGraph, CudaSlice, DriverError};

use super::choices::{Choices, Kept};
use super::few_row::{self, FewRowScratch};
use super::gemm::{Algorithm, Gemm};
use super::split_k::{Cut, SplitKScratch};
use super::{DeviceError, GateActivation, Kernels, LaunchError, Linear, Onto, Real};

/// Of our ways to a product, and of the library's proposals, how many are timed.
const OURS: usize = 16;
const PROPOSALS: usize = 8;
/// Launches of a graph that is timed, and its replays.
const LAUNCHES: usize = 12;
const REPLAYS: usize = 8;
/// Rows up to which a shape that was not timed takes [`few_row`], then [`super::split_k`], then the library: measured on an H200. One
/// that is timed on Hopper chooses between the first two at the same bound ([`Products::tune`]).
const FEW_ROWS: u32 = 1;
const OWN_ROWS: u32 = 256;
/// Milliseconds that a launch of the library's costs its neighbours, up to [`OWN_ROWS`]: ours begin beside each other, not beside it.
/// Measured on an H200: 4 to 5 us for one product of four. With more rows power is the limit, of which a pause takes little.
const LIBRARY_EXTRA: f32 = 0.005;

/// A way to a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    FewRow,
    SplitK(Cut),
    Library(Algorithm),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::FewRow => f.write_str("few_row"),
            Kind::SplitK(cut) => write!(f, "split_k {cut}"),
            Kind::Library(_) => f.write_str("cublaslt"),
        }
    }
}

impl Way {
    /// Whether it is cuBLASLt's.
    pub fn is_library(&self) -> bool {
        matches!(self.0, Kind::Library(_))
    }

    fn kept(&self) -> Kept {
        match self.0 {
            Kind::Library(algorithm) => Kept::Library(algorithm),
            _ => Kept::Own(self.to_string()),
        }
    }
}

/// What products keep: memory between blocks, the library, the choices.
#[derive(Debug)]
pub struct Products {
    few_row: FewRowScratch,
    split_k: SplitKScratch,
    gemm: Gemm,
    kept: Choices,
    chosen: HashMap<(&'static str, Linear), Way>,
}

impl Products {
    /// For products of these shapes, with whatever rows. `choices`: the file where choices are kept; one that does not fit, or none,
    /// is as an empty one.
    ///
    /// # Errors
    /// When the device has not as much memory, or cuBLASLt is not there.
    pub fn open(
        kernels: &Kernels,
        shapes: &[Linear],
        choices: Option<&Path>,
    ) -> Result<Self, DeviceError> {
        let gemm = Gemm::open(kernels)?;
        let kept = Choices::read(choices, kernels.name(), gemm.version());
        Ok(Self {
            few_row: FewRowScratch::new(kernels, shapes)?,
            split_k: SplitKScratch::new(kernels)?,
            gemm,
            kept,
            chosen: HashMap::new(),
        })
    }

    /// Every way to a shape: ours, what should be fastest first, then the library's first proposals. With a gate there is none on
    /// devices before Hopper, nor for more than 1,024 rows: then it is a launch of its own ([`super::Gate`]).
    ///
    /// # Errors
    /// When the library refuses the shape.
    pub fn ways<T: Real>(&mut self, shape: &Linear) -> Result<Vec<Way>, LaunchError> {
        let mut ways = self.own_ways(shape);
        ways.extend(self.library_ways::<T>(shape)?);
        Ok(ways)
    }

    fn own_ways(&self, shape: &Linear) -> Vec<Way> {
        let has_few_rows = !has_gate(shape) && shape.rows <= few_row::MOST_ROWS;
        let few_row = has_few_rows.then_some(Kind::FewRow);
        let cuts = self.split_k.cuts(shape).into_iter().map(Kind::SplitK);
        few_row.into_iter().chain(cuts).map(Way).collect()
    }

    fn library_ways<T: Real>(&mut self, shape: &Linear) -> Result<Vec<Way>, LaunchError> {
        if has_gate(shape) {
            return Ok(Vec::new());
        }
        let proposals = self.gemm.propose::<T>(shape, PROPOSALS)?;
        Ok(proposals.into_iter().map(|it| Way(Kind::Library(it))).collect())
    }

    /// Times the ways to a shape and keeps the best, unless it is kept already. `x` and `out` as in [`Linear::reference`], `out` is
    /// undefined afterwards; `weights` are used in turn: as many as exceed the second cache.
    ///
    /// Waits for the device, so not while a graph is captured.
    ///
    /// # Errors
    /// When lengths do not fit, or every way is refused.
    pub fn tune<T: Real>(
        &mut self,
        kernels: &Kernels,
        shape: &Linear,
        (x, weights): (&CudaSlice<T>, &[&CudaSlice<T>]),
        out: &mut CudaSlice<T>,
    ) -> Result<(), LaunchError> {
        if self.kept_way::<T>(shape)?.is_some() {
            return Ok(());
        }
        let mut ways = self.own_ways(shape);
        if kernels.is_hopper() {
            // The same for all products: behind split_k, blocks of few_row crowd on the multiprocessors that are free first.
            let has_few_rows = shape.rows <= FEW_ROWS && !has_gate(shape);
            ways.retain(|way| (way.0 == Kind::FewRow) == has_few_rows);
        }
        ways.truncate(OURS);
        ways.extend(self.library_ways::<T>(shape)?);
        let way = self.fastest(kernels, (shape, &ways), (x, weights), out)?;
        self.kept.ways.insert(name::<T>(shape), way.kept());
        self.chosen.insert((T::NAME, *shape), way);
        Ok(())
    }

    /// The fastest of some ways to a shape, of those that are not refused; otherwise as [`Self::tune`].
    ///
    /// # Errors
    /// As [`Self::tune`]: when all are refused, why the last one was.
    pub fn fastest<T: Real>(
        &mut self,
        kernels: &Kernels,
        (shape, ways): (&Linear, &[Way]),
        (x, weights): (&CudaSlice<T>, &[&CudaSlice<T>]),
        out: &mut CudaSlice<T>,
    ) -> Result<Way, LaunchError> {
        for w in weights {
            shape.check([x.len(), w.len(), out.len()])?;
        }
        let none = LaunchError::Unsupported(format!("{shape:?}"));
        let (mut graphs, mut why) = (Vec::new(), none);
        for way in ways {
            match self.graph(kernels, (shape, *way), (x, weights), out) {
                Ok(graph) => graphs.push((*way, graph)),
                Err(error) => why = error,
            }
        }
        let refused = |source| LaunchError::Driver { what: "to time a product", source };
        fastest(kernels, &graphs, shape.rows).map_err(refused)?.ok_or(why)
    }

    /// Writes what [`Self::tune`] has found to the file, if there is one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self) -> std::io::Result<()> {
        self.kept.write()
    }

    /// Some launches, since the host would take longer for one than the device.
    fn graph<T: Real>(
        &mut self,
        kernels: &Kernels,
        (shape, way): (&Linear, Way),
        (x, weights): (&CudaSlice<T>, &[&CudaSlice<T>]),
        out: &mut CudaSlice<T>,
    ) -> Result<CudaGraph, LaunchError> {
        kernels.captured(|| {
            let mut launches = weights.iter().cycle().take(LAUNCHES);
            launches.try_for_each(|w| kernels.linear_by(way, shape, (x, w), out, self))
        })
    }

    /// The way that was found to be the fastest, or should be.
    ///
    /// # Errors
    /// When the library refuses the shape.
    pub fn way<T: Real>(&mut self, shape: &Linear) -> Result<Way, LaunchError> {
        if let Some(way) = self.chosen.get(&(T::NAME, *shape)) {
            return Ok(*way);
        }
        let way = match self.kept_way::<T>(shape)? {
            Some(way) => way,
            None => self.likely_way::<T>(shape)?,
        };
        self.chosen.insert((T::NAME, *shape), way);
        Ok(way)
    }

    /// Absent: it was not timed, or the way is no longer there.
    fn kept_way<T: Real>(&mut self, shape: &Linear) -> Result<Option<Way>, LaunchError> {
        match self.kept.ways.get(&name::<T>(shape)).cloned() {
            Some(Kept::Library(algorithm)) => {
                let is_taken = self.gemm.takes::<T>(shape, algorithm)?;
                Ok(is_taken.then_some(Way(Kind::Library(algorithm))))
            }
            Some(Kept::Own(name)) => {
                Ok(self.own_ways(shape).into_iter().find(|way| way.to_string() == name))
            }
            None => Ok(None),
        }
    }

    /// The library is asked only where none of ours is likely.
    fn likely_way<T: Real>(&mut self, shape: &Linear) -> Result<Way, LaunchError> {
        let own = self.own_ways(shape);
        let most_rows = |way: &Way| if way.0 == Kind::FewRow { FEW_ROWS } else { OWN_ROWS };
        if let Some(way) = own.iter().find(|way| shape.rows <= most_rows(way)) {
            return Ok(*way);
        }
        let way = self.library_ways::<T>(shape)?.first().or(own.first()).copied();
        way.ok_or_else(|| LaunchError::Unsupported(format!("{shape:?}")))
    }
}

fn has_gate(shape: &Linear) -> bool {
    matches!(shape.onto, Onto::Gate(_))
}

fn fastest(
    kernels: &Kernels,
    graphs: &[(Way, CudaGraph)],
    rows: u32,
) -> Result<Option<Way>, DriverError> {
    let replayed: Vec<_> = graphs.iter().map(|(_, graph)| graph).collect();
    let times = kernels.replayed(&replayed, (0, REPLAYS))?;
    let time = |((way, _), time): (&(Way, CudaGraph), f32)| {
        let extra = if way.is_library() && rows <= OWN_ROWS { LIBRARY_EXTRA } else { 0.0 };
        (*way, time / LAUNCHES as f32 + extra)
    };
    let ways = graphs.iter().zip(times).map(time);
    Ok(ways.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(way, _)| way))
}

/// What a shape is called in the file.
fn name<T: Real>(shape: &Linear) -> String {
    let onto = match shape.onto {
        Onto::Nothing => "",
        Onto::Residual => " residual",
        Onto::Gate(GateActivation::Silu) => " silu",
        Onto::Gate(GateActivation::Gelu) => " gelu",
    };
    format!("{} {}x{}x{}{onto}", T::NAME, shape.rows, shape.outputs, shape.inputs)
}

impl Kernels {
    /// Queues the product, by the way that is best for it. Shapes as in [`Linear::reference`].
    ///
    /// The weights may be read ahead of what is before in the stream: they must not be what a launch before it writes. Blocks may
    /// wait for each other: nothing else may keep multiprocessors until this launch has ended.
    ///
    /// # Errors
    /// When lengths do not fit, a row of x is no multiple of 8, the library refuses, or there is no way with a gate.
    pub fn linear<T: Real>(
        &self,
        shape: &Linear,
        given: (&CudaSlice<T>, &CudaSlice<T>),
        out: &mut CudaSlice<T>,
        products: &mut Products,
    ) -> Result<(), LaunchError> {
        shape.check([given.0.len(), given.1.len(), out.len()])?;
        if shape.rows == 0 || shape.outputs == 0 {
            return Ok(());
        }
        let way = products.way::<T>(shape)?;
        self.linear_by(way, shape, given, out, products)
    }

    /// Queues the product by one of [`Products::ways`] of its shape; otherwise as [`Self::linear`].
    ///
    /// # Errors
    /// As [`Self::linear`], and when it is no way to this shape.
    pub fn linear_by<T: Real>(
        &self,
        way: Way,
        shape: &Linear,
        given: (&CudaSlice<T>, &CudaSlice<T>),
        out: &mut CudaSlice<T>,
        products: &mut Products,
    ) -> Result<(), LaunchError> {
        match way.0 {
            Kind::FewRow | Kind::Library(_) if has_gate(shape) => {
                Err(LaunchError::Unsupported(format!("{shape:?} by {way}")))
            }
            Kind::FewRow => self.few_row(shape, given, out, &mut products.few_row),
            Kind::SplitK(cut) => self.split_k((shape, &cut), given, out, &mut products.split_k),
            Kind::Library(algorithm) => {
                self.gemm((shape, algorithm), given, out, &mut products.gemm)
            }
        }
    }
}
