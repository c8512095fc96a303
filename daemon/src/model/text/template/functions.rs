//! What Hugging Face adds to Jinja: `tojson` as Python writes it, `raise_exception`, `strftime_now`.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::Kwargs;
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// Most bytes that one `tojson` may write.
const MAX_JSON_BYTES: usize = 16 << 20;
/// Most bytes that one list or map may write.
const MAX_CONTAINER_BYTES: usize = 1 << 20;
/// Longest string that is split.
const MAX_SPLIT_BYTES: usize = 2 << 20;
/// Widest indentation.
const MAX_INDENT: usize = 16;
/// Longest format of a time.
const MAX_FORMAT_BYTES: usize = 256;

/// Adds the functions to an environment.
pub(super) fn add(environment: &mut Environment<'_>) {
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(write_value);
    // Python's None cannot be iterated; without this `tools is iterable` holds for no tools.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
}

fn invalid(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, text.into())
}

fn raise_exception(text: String) -> Result<Value, Error> {
    Err(invalid(text))
}

/// Python's methods. Those that cut a string into many values are refused on very long ones, since a value takes
/// fifty times the memory of a byte and is charged only once it is there.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let long = value.as_str().is_some_and(|text| text.len() > MAX_SPLIT_BYTES);
    if long && matches!(name, "split" | "splitlines") {
        return Err(invalid(format!("{name} of more than {MAX_SPLIT_BYTES} bytes")));
    }
    if name == "format" && value.as_str().is_some_and(is_wide) {
        return Err(invalid("format with a width that is not a small constant"));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// Whether a format may pad its arguments beyond all measure: a width of five digits, or one that is an argument.
fn is_wide(format: &str) -> bool {
    let digits = format.split(|character: char| !character.is_ascii_digit());
    digits.map(str::len).max() >= Some(5) || format.contains(":{")
}

/// Writes a value where `{{ }}` stands. Lists and maps are cut off at a limit while they are written, since shared
/// parts can make them endless.
fn write_value(
    out: &mut Output<'_>,
    state: &mut State<'_, '_>,
    value: &Value,
) -> Result<(), Error> {
    if value.as_str().is_some() || value.is_number() || value.is_undefined() {
        return minijinja::escape_formatter(out, state, value);
    }
    let mut limited = LimitedText { out, left: MAX_CONTAINER_BYTES };
    write!(limited, "{value}").map_err(|_| invalid("a list or map is too long to be written"))
}

/// Text that fails beyond a limit.
struct LimitedText<'a, 'b> {
    out: &'a mut Output<'b>,
    left: usize,
}

impl fmt::Write for LimitedText<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.left = self.left.checked_sub(text.len()).ok_or(fmt::Error)?;
        self.out.write_str(text).map_err(|_| fmt::Error)
    }
}

/// JSON with Python's spaces; characters outside ASCII stay as they are unless `ensure_ascii` is set.
fn to_json(value: Value, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let mut json =
        serde_json::to_value(Bounded(&value)).map_err(|error| invalid(error.to_string()))?;
    if sorted {
        json.sort_all_objects();
    }
    let mut out = Limited(Vec::new());
    let written = match indent {
        Some(indent) if indent > MAX_INDENT => {
            return Err(invalid(format!("indent is {indent}, wanted at most {MAX_INDENT}")));
        }
        Some(indent) => {
            let spaces = " ".repeat(indent);
            write(&json, &mut out, PrettyFormatter::with_indent(spaces.as_bytes()))
        }
        None => write(&json, &mut out, Python::new(separators)?),
    };
    written.map_err(|error| invalid(error.to_string()))?;
    let text = String::from_utf8(out.0).map_err(|error| invalid(error.to_string()))?;
    Ok(Value::from(if ascii { escape_unicode(&text) } else { text }))
}

fn write(
    json: &serde_json::Value,
    out: &mut Limited,
    formatter: impl Formatter,
) -> serde_json::Result<()> {
    json.serialize(&mut Serializer::with_formatter(out, formatter))
}

/// A value whose JSON must fit the limit: shared parts can make it much longer than the memory it takes.
struct Bounded<'a>(&'a Value);

impl Serialize for Bounded<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let measured = serde_json::to_writer(Limited(Vec::new()), self.0);
        measured.map_err(serde::ser::Error::custom)?;
        self.0.serialize(serializer)
    }
}

/// A writer that fails beyond the limit.
struct Limited(Vec<u8>);

impl Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_JSON_BYTES {
            return Err(io::Error::other(format!("JSON is longer than {MAX_JSON_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Python's separators: `", "` and `": "` unless others are asked for.
struct Python {
    item: String,
    key: String,
}

impl Python {
    fn new(separators: Option<Vec<String>>) -> Result<Self, Error> {
        match separators.as_deref() {
            None => Ok(Self { item: ", ".to_owned(), key: ": ".to_owned() }),
            Some([item, key]) if item.len() <= MAX_INDENT && key.len() <= MAX_INDENT => {
                Ok(Self { item: item.clone(), key: key.clone() })
            }
            Some(_) => Err(invalid("separators must be two short strings")),
        }
    }
}

impl Formatter for Python {
    fn begin_array_value<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(self.item.as_bytes()) }
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }
}

/// Writes what is not ASCII as UTF-16 escapes.
fn escape_unicode(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_ascii() {
            escaped.push(character);
            continue;
        }
        for unit in character.encode_utf16(&mut [0; 2]) {
            escaped.push_str(&format!("\\u{unit:04x}"));
        }
    }
    escaped
}

/// The time of day in UTC, in Python's format.
fn strftime_now(format: String) -> Result<String, Error> {
    if format.len() > MAX_FORMAT_BYTES {
        return Err(invalid("the format of the time is too long"));
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Moment::at(since.as_secs()).write(&format)
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// A second of the Gregorian calendar.
#[derive(Debug)]
struct Moment {
    year: u64,
    /// From 0.
    month: usize,
    day: u64,
    day_of_year: u64,
    weekday: &'static str,
    second_of_day: u64,
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of(year: u64, month: usize) -> u64 {
    match month {
        1 if is_leap(year) => 29,
        1 => 28,
        3 | 5 | 8 | 10 => 30,
        _ => 31,
    }
}

impl Moment {
    /// From seconds since 1970, which was a Thursday.
    fn at(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let weekday = usize::try_from(days % 7).unwrap_or(0);
        let (mut year, mut left) = (1970, days);
        while left >= 365 + u64::from(is_leap(year)) {
            left -= 365 + u64::from(is_leap(year));
            year += 1;
        }
        let day_of_year = left + 1;
        let mut month = 0;
        while left >= days_of(year, month) {
            left -= days_of(year, month);
            month += 1;
        }
        let weekday = DAYS.get(weekday).copied().unwrap_or_default();
        Self { year, month, day: left + 1, day_of_year, weekday, second_of_day: seconds % 86_400 }
    }

    fn write(&self, format: &str) -> Result<String, Error> {
        let mut text = String::new();
        let mut rest = format.chars();
        while let Some(character) = rest.next() {
            if character != '%' {
                text.push(character);
                continue;
            }
            match rest.next() {
                Some('-') => {
                    let field = rest.next().map(|code| self.field(code)).transpose()?;
                    let field = field.unwrap_or_default();
                    let short = field.trim_start_matches(['0', ' ']);
                    text.push_str(if short.is_empty() { "0" } else { short });
                }
                Some(code) => text.push_str(&self.field(code)?),
                None => text.push('%'),
            }
        }
        Ok(text)
    }

    fn field(&self, code: char) -> Result<String, Error> {
        let month = MONTHS.get(self.month).copied().unwrap_or_default();
        let (hour, minute, second) =
            (self.second_of_day / 3600, self.second_of_day / 60 % 60, self.second_of_day % 60);
        let short = |name: &str| name.chars().take(3).collect::<String>();
        Ok(match code {
            'Y' => self.year.to_string(),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month + 1),
            'B' => month.to_owned(),
            'b' | 'h' => short(month),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year),
            'A' => self.weekday.to_owned(),
            'a' => short(self.weekday),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'F' => format!("{}-{:02}-{:02}", self.year, self.month + 1, self.day),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'Z' => "UTC".to_owned(),
            'z' => "+0000".to_owned(),
            '%' => "%".to_owned(),
            other => return Err(invalid(format!("the time format %{other} is not supported"))),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Moment;

    #[test]
    fn times_are_written_as_python_writes_them() {
        let check = |seconds, text: &str| {
            let moment = Moment::at(seconds);
            assert_eq!(moment.write("%A %d %B %Y, %-d %b %y %j %H:%M:%S %I %p").unwrap(), text);
        };
        check(0, "Thursday 01 January 1970, 1 Jan 70 001 00:00:00 12 AM");
        check(951_827_696, "Tuesday 29 February 2000, 29 Feb 00 060 12:34:56 12 PM");
        check(4_107_542_399, "Sunday 28 February 2100, 28 Feb 00 059 23:59:59 11 PM");
        assert!(Moment::at(0).write("%Q").is_err());
    }
}
