//! PAX extended headers: `LENGTH KEY=VALUE\n`, of one entry or of all that follow.

/// Attributes of one entry are kept up to this count.
const MAX_XATTRS: usize = 1024;
/// Runs of one sparse file.
pub(super) const MAX_RUNS: usize = 256 << 10;

/// The records we know, the last of a kind winning.
#[derive(Debug, Clone, Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    /// Seconds and nanoseconds.
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: Sparse,
}

/// What PAX says of a sparse file.
#[derive(Debug, Clone, Default)]
pub(super) struct Sparse {
    /// Set from dialect 1.0 on.
    pub(super) major: Option<u64>,
    /// The real name; the entry's own one is made up for old tars.
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// The map of dialects 0.0 and 0.1.
    pub(super) runs: Option<Vec<(u64, u64)>>,
    /// Of dialect 0.0: an offset that waits for its length.
    offset: Option<u64>,
}

impl Records {
    /// Adds the records of a text. `None` when it is malformed.
    pub(super) fn parse(&mut self, mut text: &[u8]) -> Option<()> {
        while !text.is_empty() {
            let space = text.iter().take(20).position(|b| *b == b' ')?;
            let length = usize::try_from(decimal(&text[..space])?).ok()?;
            let record = text.get(space + 1..length)?;
            let (newline, body) = record.split_last()?;
            if *newline != b'\n' {
                return None;
            }
            let equals = body.iter().position(|b| *b == b'=')?;
            self.record(&body[..equals], &body[equals + 1..])?;
            text = &text[length..];
        }
        Some(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        // An empty value takes back what a global header said.
        let number = || if value.is_empty() { Some(None) } else { decimal(value).map(Some) };
        let name = || {
            // A NUL in a name is never meant.
            if value.contains(&0) { None } else { Some((!value.is_empty()).then(|| value.to_vec())) }
        };
        match key {
            b"path" => self.path = name()?,
            b"linkpath" => self.link = name()?,
            b"size" => self.size = number()?,
            b"uid" => self.uid = number()?,
            b"gid" => self.gid = number()?,
            b"mtime" => self.mtime = if value.is_empty() { None } else { Some(time(value)?) },
            b"GNU.sparse.major" => self.sparse.major = number()?,
            b"GNU.sparse.name" => self.sparse.name = name()?,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = number()?,
            b"GNU.sparse.map" => self.sparse.runs = Some(comma_list(value)?),
            b"GNU.sparse.offset" => self.sparse.offset = number()?,
            b"GNU.sparse.numbytes" => {
                let run = (self.sparse.offset.take()?, decimal(value)?);
                let runs = self.sparse.runs.get_or_insert_default();
                (runs.len() < MAX_RUNS).then(|| runs.push(run))?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattr(name, value)?;
                }
            }
        }
        Some(())
    }

    fn xattr(&mut self, name: &[u8], value: &[u8]) -> Option<()> {
        self.xattrs.retain(|(known, _)| known != name);
        (self.xattrs.len() < MAX_XATTRS).then(|| self.xattrs.push((name.to_vec(), value.to_vec())))
    }
}

/// Decimal digits and nothing else.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |value, digit| {
        if !digit.is_ascii_digit() {
            return None;
        }
        value.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    })
}

/// `[-]SECONDS[.FRACTION]` as seconds rounded down and nanoseconds.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = text.iter().position(|b| *b == b'.').unwrap_or(text.len());
    let seconds = i64::try_from(decimal(&text[..dot])?).ok()?;
    let fraction = text.get(dot + 1..).unwrap_or(b"");
    let mut nanos = 0u32;
    for i in 0..9 {
        let digit = fraction.get(i).copied().unwrap_or(b'0');
        if !digit.is_ascii_digit() {
            return None;
        }
        nanos = nanos * 10 + u32::from(digit - b'0');
    }
    Some(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

/// `offset,length,offset,length…`
fn comma_list(text: &[u8]) -> Option<Vec<(u64, u64)>> {
    let mut runs = Vec::new();
    if text.is_empty() {
        return Some(runs);
    }
    let mut numbers = text.split(|b| *b == b',');
    while let Some(offset) = numbers.next() {
        let run = (decimal(offset)?, decimal(numbers.next()?)?);
        (runs.len() < MAX_RUNS).then(|| runs.push(run))?;
    }
    Some(runs)
}
