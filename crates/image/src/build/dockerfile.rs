//! The text of a Dockerfile: logical lines, and words with quotes and variables.

/// One instruction.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Instruction {
    /// Where it begins, from 1.
    pub(super) line: usize,
    /// In upper case.
    pub(super) keyword: String,
    pub(super) rest: String,
}

/// Splits a file into instructions; comments and empty lines go, continued lines are joined.
pub(super) fn instructions(text: &str) -> Vec<Instruction> {
    let mut found = Vec::new();
    let mut open: Option<(usize, String)> = None;
    for (number, line) in text.lines().enumerate() {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with('#') {
            continue;
        }
        let (start, mut joined) = open.take().unwrap_or((number + 1, String::new()));
        match trimmed.strip_suffix('\\') {
            Some(part) => {
                joined.push_str(part);
                joined.push(' ');
                open = Some((start, joined));
            }
            None => {
                joined.push_str(trimmed);
                found.push(instruction(start, &joined));
            }
        }
    }
    found.extend(open.map(|(start, joined)| instruction(start, &joined)));
    found
}

fn instruction(line: usize, text: &str) -> Instruction {
    let text = text.trim();
    let (keyword, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    Instruction { line, keyword: keyword.to_ascii_uppercase(), rest: rest.trim().to_owned() }
}

/// Splits into words, takes quotes away and puts variables in; `env` has `NAME=VALUE`.
pub(super) fn words(text: &str, env: &[String]) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (c, None) if c.is_whitespace() => words.extend(word.take()),
            ('"' | '\'', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, Some(open)) if c == open => quote = None,
            ('\\', None | Some('"')) => word.get_or_insert_default().extend(chars.next()),
            ('$', None | Some('"')) => {
                let mut name = String::new();
                if chars.next_if_eq(&'{').is_some() {
                    loop {
                        match chars.next() {
                            Some('}') => break,
                            Some(c) => name.push(c),
                            None => return Err("a ${ without its }".to_owned()),
                        }
                    }
                } else {
                    while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
                        name.push(c);
                    }
                    if name.is_empty() {
                        word.get_or_insert_default().push('$');
                        continue;
                    }
                }
                word.get_or_insert_default().push_str(&variable(&name, env)?);
            }
            (c, _) => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err("a quote that is not closed".to_owned());
    }
    words.extend(word);
    Ok(words)
}

fn variable(expression: &str, env: &[String]) -> Result<String, String> {
    let (name, default) = match expression.split_once(":-") {
        Some((name, default)) => (name, default),
        None => (expression, ""),
    };
    if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(format!("${{{expression}}} is neither ${{VAR}} nor ${{VAR:-default}}"));
    }
    let value = env.iter().find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    Ok(value.filter(|value| !value.is_empty()).unwrap_or(default).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continued_lines_are_one_instruction_and_comments_are_none() {
        let found = instructions("# c\nfrom scratch\nENV A=1 \\\n # within\n B=2\n");
        assert_eq!(
            (found[0].line, found[0].keyword.as_str(), found[0].rest.as_str()),
            (2, "FROM", "scratch")
        );
        assert_eq!(found[1].line, 3);
        assert_eq!(words(&found[1].rest, &[]).unwrap(), ["A=1", "B=2"]);
    }

    #[test]
    fn quotes_and_variables_are_as_in_a_shell() {
        let env = ["A=x y".to_owned()];
        let text = r#"$A "${A}b" '$A' \$A ${B:-d} """#;
        assert_eq!(words(text, &env).unwrap(), ["x y", "x yb", "$A", "$A", "d", ""]);
        assert!(words("${A", &env).unwrap_err().contains("without"));
        assert!(words("'a", &env).unwrap_err().contains("not closed"));
    }
}
