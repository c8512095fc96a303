//! Line plots as SVG, without a library: axes with round ticks, one colour a line, a legend.

use std::fmt::Write;

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 400.0;
/// Room for the title, the axes and, to the right, the legend: left, top, right, bottom.
const MARGINS: [f64; 4] = [76.0, 40.0, 300.0, 52.0];
/// Distinct also to those who do not see red and green apart (Okabe and Ito, 2008).
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
/// Points of a line; more would not be seen.
const MOST_POINTS: usize = 600;

/// Where a value lies, and what it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
}

/// A named run of points.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<Point>,
}

/// A plot from 0 to the largest values.
#[derive(Debug, Clone)]
pub(super) struct Plot {
    /// Also the file's name.
    pub(super) key: &'static str,
    pub(super) title: &'static str,
    pub(super) x_label: &'static str,
    pub(super) y_label: &'static str,
    pub(super) lines: Vec<Line>,
}

/// From values to the places of the picture.
#[derive(Debug, Clone, Copy)]
struct Scale {
    x_most: f64,
    y_most: f64,
}

impl Scale {
    fn x(self, value: f64) -> f64 {
        MARGINS[0] + value / self.x_most * (WIDTH - MARGINS[0] - MARGINS[2])
    }

    fn y(self, value: f64) -> f64 {
        HEIGHT - MARGINS[3] - value / self.y_most * (HEIGHT - MARGINS[1] - MARGINS[3])
    }
}

impl Plot {
    /// The picture.
    pub(super) fn svg(&self) -> String {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let most = |value: fn(&Point) -> f64| points().map(value).fold(0.0, f64::max).max(1e-9);
        let scale = Scale { x_most: most(|point| point.x), y_most: most(|point| point.y) * 1.04 };
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"{}\" y=\"22\" text-anchor=\"middle\" font-size=\"15\">{}</text>\n",
            WIDTH / 2.0,
            escaped(self.title)
        );
        self.put_axes(scale, &mut svg);
        for (index, line) in self.lines.iter().enumerate() {
            put_line(line, index, scale, &mut svg);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn put_axes(&self, scale: Scale, svg: &mut String) {
        let (left, right) = (MARGINS[0], WIDTH - MARGINS[2]);
        let bottom = HEIGHT - MARGINS[3];
        for tick in ticks(scale.x_most) {
            let x = scale.x(tick);
            put(
                svg,
                format_args!(
                    "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>",
                    bottom + 16.0
                ),
            );
        }
        for tick in ticks(scale.y_most) {
            let y = scale.y(tick);
            put(svg, format_args!("<path d=\"M{left} {y:.1}H{right}\" stroke=\"#ddd\"/>"));
            put(
                svg,
                format_args!(
                    "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{tick}</text>",
                    left - 6.0,
                    y + 4.0
                ),
            );
        }
        put(
            svg,
            format_args!(
                "<path d=\"M{left} {}V{bottom}H{right}\" fill=\"none\" stroke=\"black\"/>",
                MARGINS[1]
            ),
        );
        let (middle, label) = ((left + right) / 2.0, escaped(self.x_label));
        put(
            svg,
            format_args!(
                "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
                HEIGHT - 14.0
            ),
        );
        let (middle, label) = ((MARGINS[1] + bottom) / 2.0, escaped(self.y_label));
        put(
            svg,
            format_args!(
                "<text transform=\"translate(16 {middle}) rotate(-90)\" text-anchor=\"middle\">{label}</text>"
            ),
        );
    }
}

fn put_line(line: &Line, index: usize, scale: Scale, svg: &mut String) {
    let colour = COLOURS[index % COLOURS.len()];
    let step = line.points.len().div_ceil(MOST_POINTS).max(1);
    let place = |point: &Point| format!("{:.1},{:.1}", scale.x(point.x), scale.y(point.y));
    let points: Vec<String> = line.points.iter().step_by(step).map(place).collect();
    put(
        svg,
        format_args!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\" points=\"{}\"/>",
            points.join(" ")
        ),
    );
    let y = MARGINS[1] + 14.0 + 17.0 * f64::from(u32::try_from(index).unwrap_or_default());
    let x = WIDTH - MARGINS[2] + 12.0;
    put(
        svg,
        format_args!(
            "<rect x=\"{x}\" y=\"{}\" width=\"14\" height=\"4\" fill=\"{colour}\"/>",
            y - 6.0
        ),
    );
    put(svg, format_args!("<text x=\"{}\" y=\"{y}\">{}</text>", x + 20.0, escaped(&line.name)));
}

fn put(svg: &mut String, element: std::fmt::Arguments<'_>) {
    // A string takes everything.
    let _ = writeln!(svg, "{element}");
}

/// Four to ten round values from 0 to `most`.
fn ticks(most: f64) -> Vec<f64> {
    let power = 10_f64.powf((most / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter();
    let step = step.clone().find(|step| most / step <= 8.0).unwrap_or(most);
    let tick = |index: u32| f64::from(index) * step;
    // Rounded, since a multiple of a tenth is none in binary.
    let rounded = |value: f64| format!("{value:.6}").parse().unwrap_or(value);
    (0..=10).map(tick).take_while(|tick| *tick <= most * (1.0 + 1e-9)).map(rounded).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_stay_below_the_largest_value() {
        assert_eq!(ticks(100.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(0.7), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]);
        assert_eq!(ticks(2048.0), [0.0, 500.0, 1000.0, 1500.0, 2000.0]);
    }

    #[test]
    fn a_plot_holds_its_lines_inside_its_frame_and_escapes_names() {
        let points = vec![Point { x: 0.0, y: 0.0 }, Point { x: 10.0, y: 5.0 }];
        let line = Line { name: "a < b".to_owned(), points };
        let plot = Plot { key: "k", title: "t", x_label: "x", y_label: "y", lines: vec![line] };
        let svg = plot.svg();
        assert!(svg.contains("points=\"76.0,348.0 700.0,"), "{svg}");
        assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
    }
}
