//! Test only: what the README says the operator may do is what the chart lets it do.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// Verbs by resource.
type Rules = BTreeMap<String, BTreeSet<String>>;

#[derive(Deserialize)]
struct Rule {
    resources: Vec<String>,
    verbs: Vec<String>,
}

/// Each rule of the chart is one line.
fn of_chart() -> Rules {
    let template = include_str!("../../charts/bindery/templates/operator.yaml");
    let lines = template.lines().map(str::trim).filter(|line| line.starts_with("- {apiGroups:"));
    let mut rules = Rules::new();
    for line in lines {
        let [rule]: [Rule; 1] = serde_yaml_ng::from_str(line).unwrap();
        for resource in rule.resources {
            rules.entry(resource).or_default().extend(rule.verbs.clone());
        }
    }
    rules
}

/// The table whose columns are resources, verbs and the reason.
fn of_readme() -> Rules {
    let readme = include_str!("../../README.md");
    let table = readme.split_once("| resource | verbs | because |").unwrap().1;
    let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
    let words = |cell: &str| cell.trim().split(", ").map(str::to_owned).collect::<Vec<_>>();
    let mut rules = Rules::new();
    for row in rows {
        let cells: Vec<_> = row.split('|').collect();
        for resource in words(cells[1]).into_iter().filter(|word| word != "own namespace") {
            rules.insert(resource, words(cells[2]).into_iter().collect());
        }
    }
    rules
}

#[test]
fn the_readme_lists_what_the_chart_allows() {
    let chart = of_chart();
    assert!(chart.len() > 10, "the template has moved: {chart:?}");
    assert_eq!(of_readme(), chart);
}
