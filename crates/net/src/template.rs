//! A CNI configuration from a template, once the cluster has assigned addresses to the node.
//!
//! The templates are those that containerd's `conf_template` knows: Go's, of which that much is understood as
//! such templates use.
//!
//! ```text
//!   {{.PodCIDR}}                                  the first range
//!   {{range $i, $r := .PodCIDRRanges}} … {{end}}  for all ranges, {{$r}} or {{.}} is one, {{$i}} its number from 0
//!   {{range $i, $r := .Routes}} … {{end}}         for 0.0.0.0/0 and ::/0, as far as ranges of that family are there
//!   {{if $i}} … {{end}}                           unless it is 0 (or empty)
//!   {{- … -}}                                     without the white space beside it
//! ```

use thiserror::Error;

/// What a template is filled with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Values {
    /// `PodCIDRRanges`; the first one is `PodCIDR`.
    pub(crate) ranges: Vec<String>,
    /// `Routes`
    pub(crate) routes: Vec<String>,
}

/// What is wrong with a template.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TemplateProblem {
    /// An action that is not known.
    #[error(
        "line {line}: {{{{{action}}}}} is not understood (known: .PodCIDR, range over .PodCIDRRanges or .Routes, \
         if, end, and the variables of a range)"
    )]
    Unknown {
        /// From 1.
        line: usize,
        /// Between the braces.
        action: String,
    },
    /// Braces without their end.
    #[error("line {line}: {{{{ without }}}}")]
    Unclosed {
        /// From 1.
        line: usize,
    },
    /// `range` or `if` without `end`, or the other way round.
    #[error("line {line}: range or if and end do not go together")]
    Unbalanced {
        /// From 1.
        line: usize,
    },
}

/// Fills a template.
pub(crate) fn fill(template: &str, values: &Values) -> Result<String, TemplateProblem> {
    let tokens = tokens(template)?;
    let mut rest = tokens.iter();
    let body = parse(&mut rest, None)?;
    let mut filled = String::new();
    show(&body, values, &mut Vec::new(), &mut filled)?;
    Ok(filled)
}

#[derive(Debug, PartialEq, Eq)]
enum Token<'a> {
    Text(&'a str),
    Action { line: usize, action: &'a str },
}

fn tokens(template: &str) -> Result<Vec<Token<'_>>, TemplateProblem> {
    let mut tokens = Vec::new();
    let mut rest = template;
    let mut trim = false;
    while let Some(at) = rest.find("{{") {
        let line = template[..template.len() - rest.len() + at].matches('\n').count() + 1;
        let (text, inner) = (&rest[..at], &rest[at + 2..]);
        let (inner, after) = inner.split_once("}}").ok_or(TemplateProblem::Unclosed { line })?;
        let text = if trim { text.trim_start() } else { text };
        let before = inner.strip_prefix('-').filter(|inner| inner.starts_with(char::is_whitespace));
        tokens.push(Token::Text(if before.is_some() { text.trim_end() } else { text }));
        let inner = before.unwrap_or(inner);
        let behind = inner.strip_suffix('-').filter(|inner| inner.ends_with(char::is_whitespace));
        trim = behind.is_some();
        tokens.push(Token::Action { line, action: behind.unwrap_or(inner).trim() });
        rest = after;
    }
    tokens.push(Token::Text(if trim { rest.trim_start() } else { rest }));
    Ok(tokens)
}

#[derive(Debug)]
enum Part<'a> {
    Text(&'a str),
    Show { line: usize, name: &'a str },
    If { line: usize, name: &'a str, body: Vec<Part<'a>> },
    Range { line: usize, index: Option<&'a str>, item: Option<&'a str>, of: &'a str, body: Vec<Part<'a>> },
}

/// Up to the `end` that belongs to the action in line `open`, or to the end of the template.
fn parse<'a>(
    tokens: &mut std::slice::Iter<'_, Token<'a>>,
    open: Option<usize>,
) -> Result<Vec<Part<'a>>, TemplateProblem> {
    let mut parts = Vec::new();
    while let Some(token) = tokens.next() {
        let (line, action) = match token {
            Token::Text(text) => {
                parts.push(Part::Text(text));
                continue;
            }
            Token::Action { line, action } => (*line, *action),
        };
        match action.split_once(char::is_whitespace).unwrap_or((action, "")) {
            ("end", "") if open.is_some() => return Ok(parts),
            ("end", "") => return Err(TemplateProblem::Unbalanced { line }),
            ("if", name) => {
                parts.push(Part::If { line, name: name.trim(), body: parse(tokens, Some(line))? });
            }
            ("range", what) => {
                let (variables, of) = what.split_once(":=").unwrap_or(("", what));
                let (index, item) = match variables.split_once(',') {
                    Some((index, item)) => (Some(index.trim()), Some(item.trim())),
                    None => (None, Some(variables.trim()).filter(|item| !item.is_empty())),
                };
                let body = parse(tokens, Some(line))?;
                parts.push(Part::Range { line, index, item, of: of.trim(), body });
            }
            _ => parts.push(Part::Show { line, name: action }),
        }
    }
    match open {
        Some(line) => Err(TemplateProblem::Unbalanced { line }),
        None => Ok(parts),
    }
}

/// The variables of the ranges around, innermost last; `.` is one of them.
type Scope<'a> = Vec<(&'a str, String)>;

fn show<'a>(
    parts: &[Part<'a>],
    values: &Values,
    scope: &mut Scope<'a>,
    out: &mut String,
) -> Result<(), TemplateProblem> {
    for part in parts {
        match part {
            Part::Text(text) => out.push_str(text),
            Part::Show { line, name } => out.push_str(&value(*line, name, values, scope)?),
            Part::If { line, name, body } => {
                if !matches!(value(*line, name, values, scope)?.as_str(), "" | "0") {
                    show(body, values, scope, out)?;
                }
            }
            Part::Range { line, index, item, of, body } => {
                for (number, one) in list(*line, of, values)?.iter().enumerate() {
                    let outer = scope.len();
                    scope.push((".", one.clone()));
                    scope.extend(item.map(|name| (name, one.clone())));
                    scope.extend(index.map(|name| (name, number.to_string())));
                    show(body, values, scope, out)?;
                    scope.truncate(outer);
                }
            }
        }
    }
    Ok(())
}

fn value(line: usize, name: &str, values: &Values, scope: &Scope<'_>) -> Result<String, TemplateProblem> {
    if let Some((_, value)) = scope.iter().rev().find(|(known, _)| *known == name) {
        return Ok(value.clone());
    }
    match name {
        ".PodCIDR" => Ok(values.ranges.first().cloned().unwrap_or_default()),
        _ => Err(TemplateProblem::Unknown { line, action: name.chars().take(80).collect() }),
    }
}

fn list<'a>(line: usize, name: &str, values: &'a Values) -> Result<&'a [String], TemplateProblem> {
    match name {
        ".PodCIDRRanges" => Ok(&values.ranges),
        ".Routes" => Ok(&values.routes),
        _ => {
            let action = format!("range {}", name.chars().take(80).collect::<String>());
            Err(TemplateProblem::Unknown { line, action })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dual() -> Values {
        Values {
            ranges: vec!["10.1.2.0/24".into(), "fd00::/64".into()],
            routes: vec!["0.0.0.0/0".into(), "::/0".into()],
        }
    }

    #[test]
    fn templates_of_containerd_nodes_are_filled_as_there() {
        let template = r#""subnet": "{{.PodCIDR}}", "ranges": [{{range $i, $range := .PodCIDRRanges}}{{if $i}}, {{end}}[{"subnet": "{{$range}}"}]{{end}}],
            "routes": [ {{- range $i, $route := .Routes}}{{ if $i }}, {{ end }}{"dst": "{{$route}}"}{{ end -}} ]"#;
        assert_eq!(
            fill(template, &dual()).unwrap(),
            r#""subnet": "10.1.2.0/24", "ranges": [[{"subnet": "10.1.2.0/24"}], [{"subnet": "fd00::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]"#
        );
        assert_eq!(fill("{{range .Routes}}<{{.}}>{{end}}", &dual()).unwrap(), "<0.0.0.0/0><::/0>");
        assert_eq!(fill("{{range $r := .Routes}}{{$r}} {{end}}", &dual()).unwrap(), "0.0.0.0/0 ::/0 ");
        assert_eq!(fill("no {braces} }} here", &dual()).unwrap(), "no {braces} }} here");
    }

    #[test]
    fn what_is_not_understood_is_told_with_its_line() {
        for (template, problem) in [
            ("\n\n{{.Subnet}}", "line 3: {{.Subnet}} is not understood"),
            ("{{range .Nodes}}{{end}}", "line 1: {{range .Nodes}} is not understood"),
            ("{{$route}}", "{{$route}} is not understood"),
            ("{{range $i, $r := .Routes}}{{end}}{{$r}}", "{{$r}} is not understood"),
            ("{{range .Routes}}{{else}}{{end}}", "{{else}} is not understood"),
            ("{{printf \"%s\" .PodCIDR}}", "is not understood"),
            ("{{.PodCIDR", "line 1: {{ without }}"),
            ("x\n{{range .Routes}}", "line 2: range or if and end"),
            ("{{end}}", "line 1: range or if and end"),
        ] {
            let error = fill(template, &dual()).unwrap_err().to_string();
            assert!(error.contains(problem), "{template}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_template_makes_it_panic(template in r"(\{\{|\}\}|-| |range|if|end|:=|,|\$i|\.|\.Routes|é|\n){0,24}") {
            let _ = fill(&template, &dual());
        }
    }
}
