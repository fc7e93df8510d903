//! Results on standard output: a table for people, one JSON document with `--json`.

use std::fmt::{self, Display};
use std::io::{self, Write};

use serde::Serialize;

use crate::exit::Exit;

/// A subcommand's result in both of its forms; they are made from one value so that they cannot disagree.
pub trait Report: Serialize {
    /// The form for people.
    fn text(&self) -> String;

    /// Writes the result to `target`, ended by a line break.
    fn write(&self, json: bool, mut target: impl Write) -> io::Result<()>
    where
        Self: Sized,
    {
        if json {
            serde_json::to_writer_pretty(&mut target, self)?;
            writeln!(target)
        } else {
            let text = self.text();
            let text = text.trim_end_matches('\n');
            if text.is_empty() {
                Ok(())
            } else {
                writeln!(target, "{text}")
            }
        }
    }
}

/// Writes a report to standard output.
pub(crate) fn show(report: &impl Report, json: bool) -> Exit {
    match report.write(json, io::stdout().lock()) {
        // Whoever closed the pipe has read what it wanted.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => complain(&error),
        _ => Exit::Ok,
    }
}

/// Tells the user in one sentence what went wrong.
pub(crate) fn complain(problem: &impl Display) -> Exit {
    // Nowhere left to complain when even that cannot be written.
    let _written = writeln!(io::stderr().lock(), "kvlane: {problem}");
    Exit::Problem
}

/// Rows under a header, columns as wide as their widest cell, numbers to the right.
#[derive(Clone, Debug)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table with these column names.
    pub fn new<const COLUMNS: usize>(header: [&str; COLUMNS]) -> Self {
        Self {
            header: header.map(str::to_owned).to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty.
    pub fn row<I, T>(&mut self, cells: I)
    where
        I: IntoIterator<Item = T>,
        T: Display,
    {
        let mut cells: Vec<String> = cells.into_iter().map(|cell| cell.to_string()).collect();
        cells.resize(self.header.len(), String::new());
        self.rows.push(cells);
    }
}

impl Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = || std::iter::once(&self.header).chain(&self.rows);
        let columns: Vec<(usize, bool)> = (0..self.header.len())
            .map(|column| {
                let width = lines()
                    .map(|line| line[column].chars().count())
                    .max()
                    .unwrap_or(0);
                let numeric = self
                    .rows
                    .iter()
                    .all(|row| row[column].starts_with(|first: char| first.is_ascii_digit()));
                (width, numeric && !self.rows.is_empty())
            })
            .collect();
        for line in lines() {
            let cells = line.iter().zip(&columns).map(|(cell, &(width, numeric))| {
                if numeric {
                    format!("{cell:>width$}")
                } else {
                    format!("{cell:<width$}")
                }
            });
            writeln!(formatter, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Sizes {
        sizes: Vec<(String, u64)>,
    }

    impl Report for Sizes {
        fn text(&self) -> String {
            let mut table = Table::new(["segment", "bytes"]);
            for (name, bytes) in &self.sizes {
                table.row([name, &bytes.to_string()]);
            }
            table.to_string()
        }
    }

    fn written(json: bool) -> String {
        let report = Sizes {
            sizes: vec![("a".to_owned(), 5), ("longer-é".to_owned(), 67_108_864)],
        };
        let mut target = Vec::new();
        report.write(json, &mut target).unwrap();
        String::from_utf8(target).unwrap()
    }

    #[test]
    fn people_get_aligned_columns() {
        assert_eq!(
            written(false),
            "segment      bytes\na                5\nlonger-é  67108864\n"
        );
    }

    #[test]
    fn scripts_get_one_json_document() {
        let value: serde_json::Value = serde_json::from_str(&written(true)).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"sizes": [["a", 5], ["longer-é", 67_108_864]]})
        );
    }
}
