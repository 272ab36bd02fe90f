//! What an answer of a name server opens. Its bytes are a stranger's, and in league with the guest they may be anything.

use std::net::IpAddr;
use std::time::Duration;

use a3s_box_core::egress::EgressPolicy;
use hickory_proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData};

use super::rules::is_reserved;

const SHORTEST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(3600);
/// Longer chains of aliases are followed by no resolver either.
const MAX_ALIASES: usize = 16;

/// The addresses of a frame's answer that the policy opens, and for how long.
pub(super) fn opened(frame: &[u8], policy: &EgressPolicy) -> Vec<(IpAddr, Duration)> {
    let Some(message) = udp_payload(frame).and_then(|bytes| Message::from_vec(bytes).ok()) else {
        return Vec::new();
    };
    let [question] = message.queries.as_slice() else { return Vec::new() };
    let labels: Vec<&[u8]> = question.name.iter().collect();
    let answered = message.metadata.message_type == MessageType::Response
        && message.metadata.op_code == OpCode::Query
        && message.metadata.response_code == ResponseCode::NoError
        && question.query_class == DNSClass::IN;
    if !answered || !policy.allows_name(&labels) {
        return Vec::new();
    }
    let owners = aliases(&message, &question.name);
    let records = message.answers.iter().filter(|record| owners.contains(&&record.name));
    let addresses = records.filter_map(|record| {
        let ip = match &record.data {
            RData::A(ip) => IpAddr::V4(ip.0),
            RData::AAAA(ip) => IpAddr::V6(ip.0),
            _ => return None,
        };
        let ttl = Duration::from_secs(record.ttl.into());
        can_be_pinned(ip).then_some((ip, ttl.clamp(SHORTEST, LONGEST)))
    });
    addresses.collect()
}

/// The name that was asked for and those that it stands for, in the order of the answer's CNAME records.
fn aliases<'a>(message: &'a Message, asked: &'a Name) -> Vec<&'a Name> {
    let mut owners = vec![asked];
    while owners.len() <= MAX_ALIASES {
        let next = message.answers.iter().find_map(|record| match &record.data {
            RData::CNAME(target) if owners.last().is_some_and(|last| **last == record.name) => {
                Some(&target.0)
            }
            _ => None,
        });
        match next {
            Some(next) if !owners.contains(&next) => owners.push(next),
            Some(_) | None => break,
        }
    }
    owners
}

/// Whoever owns a name can have it lead anywhere.
fn can_be_pinned(ip: IpAddr) -> bool {
    let other = match ip {
        IpAddr::V4(ip) => ip.is_broadcast(),
        IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some(),
    };
    !(other || ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() || is_reserved(ip))
}

/// What is in the UDP datagram of an Ethernet frame. The rules let through nothing that is not one; those with IPv6
/// extension headers, which no name server sends, are none here.
fn udp_payload(frame: &[u8]) -> Option<&[u8]> {
    let (header, packet) = frame.split_at_checked(14)?;
    let datagram = match header[12..] {
        [0x08, 0x00] => {
            let length = usize::from(packet.first()? & 0x0f) * 4;
            let fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff;
            (*packet.get(9)? == 17 && fragment == 0 && length >= 20).then(|| packet.get(length..))??
        }
        [0x86, 0xdd] => (*packet.get(6)? == 17).then(|| packet.get(40..))??,
        _ => return None,
    };
    let length = usize::from(u16::from_be_bytes([*datagram.get(4)?, *datagram.get(5)?]));
    datagram.get(8..length)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use hickory_proto::op::Query;
    use hickory_proto::rr::rdata::{A, AAAA, CNAME};
    use hickory_proto::rr::{Record, RecordType};
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn a(owner: &str, ttl: u32, ip: [u8; 4]) -> Record {
        Record::from_rdata(name(owner), ttl, RData::A(A(Ipv4Addr::from(ip))))
    }

    fn alias(owner: &str, target: &str) -> Record {
        Record::from_rdata(name(owner), 5, RData::CNAME(CNAME(name(target))))
    }

    fn answer(asked: &str, records: Vec<Record>) -> Message {
        let mut message = Message::response(7, OpCode::Query);
        message.add_query(Query::query(name(asked), RecordType::A));
        message.add_answers(records);
        message
    }

    fn in_a_frame(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x45]);
        frame.extend([0; 8]);
        frame.extend([17]);
        frame.extend([0; 10]);
        frame.extend([0, 53, 0x99, 0x99]);
        frame.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(payload);
        frame
    }

    fn pins(message: &Message) -> Vec<(String, u64)> {
        let policy = EgressPolicy::parse("example.com *.example.org", &[]).unwrap();
        let opened = opened(&in_a_frame(&message.to_vec().unwrap()), &policy);
        opened.into_iter().map(|(ip, time)| (ip.to_string(), time.as_secs())).collect()
    }

    #[test]
    fn an_allowed_name_opens_its_addresses_for_a_minute_to_an_hour() {
        let mut records = vec![a("EXAMPLE.com.", 0, [192, 0, 2, 1]), a("example.com.", 300, [192, 0, 2, 2])];
        let ip = RData::AAAA(AAAA("2001:db8::1".parse::<Ipv6Addr>().unwrap()));
        records.push(Record::from_rdata(name("example.com."), 1 << 30, ip));
        let expected = [("192.0.2.1", 60), ("192.0.2.2", 300), ("2001:db8::1", 3600)];
        assert_eq!(pins(&answer("example.com.", records)), expected.map(|(ip, time)| (ip.to_owned(), time)));
    }

    #[test]
    fn aliases_are_followed_and_what_is_not_on_the_way_is_not_opened() {
        let records = vec![
            a("other.net.", 60, [192, 0, 2, 9]),
            alias("c.cdn.net.", "d.cdn.net."),
            alias("a.example.org.", "c.cdn.net."),
            a("d.cdn.net.", 60, [192, 0, 2, 1]),
        ];
        assert_eq!(pins(&answer("a.example.org.", records)), [("192.0.2.1".to_owned(), 60)]);
        let endless = vec![alias("example.com.", "b.net."), alias("b.net.", "example.com.")];
        assert_eq!(pins(&answer("example.com.", endless)), []);
    }

    #[test]
    fn other_names_and_what_is_no_answer_open_nothing() {
        let fine = answer("example.com.", vec![a("example.com.", 60, [192, 0, 2, 1])]);
        assert_eq!(pins(&fine).len(), 1);
        let other =
            answer("evil.com.", vec![alias("evil.com.", "example.com."), a("example.com.", 60, [6; 4])]);
        assert_eq!(pins(&other), []);
        let mut question = fine.clone();
        question.metadata.message_type = MessageType::Query;
        let mut failed = fine.clone();
        failed.metadata.response_code = ResponseCode::NXDomain;
        let mut two = fine.clone();
        two.add_query(Query::query(name("evil.com."), RecordType::A));
        for message in [question, failed, two] {
            assert_eq!(pins(&message), []);
        }
    }

    #[test]
    fn no_name_leads_to_link_local_addresses_loopback_or_multicast() {
        for ip in [[169, 254, 169, 254], [127, 0, 0, 1], [224, 0, 0, 1], [0; 4], [255; 4]] {
            assert_eq!(pins(&answer("example.com.", vec![a("example.com.", 60, ip)])), [], "{ip:?}");
        }
        for ip in
            ["fe80::1", "::1", "ff02::1", "::", "::ffff:10.0.0.1", "fd00:ec2::254", "64:ff9b::a9fe:a9fe"]
        {
            let rdata = RData::AAAA(AAAA(ip.parse().unwrap()));
            let record = Record::from_rdata(name("example.com."), 60, rdata);
            assert_eq!(pins(&answer("example.com.", vec![record])), [], "{ip}");
        }
    }

    proptest! {
        #[test]
        fn no_frame_makes_it_panic(frame: Vec<u8>, cut in 0..80_usize, flip in 0..80_usize) {
            let policy = EgressPolicy::parse("example.com", &[]).unwrap();
            opened(&frame, &policy);
            opened(&in_a_frame(&frame), &policy);
            let message = answer("example.com.", vec![a("example.com.", 60, [192, 0, 2, 1])]);
            let mut whole = in_a_frame(&message.to_vec().unwrap());
            if let Some(byte) = whole.get_mut(flip) {
                *byte ^= frame.first().copied().unwrap_or(0xff);
            }
            opened(&whole, &policy);
            whole.truncate(cut);
            opened(&whole, &policy);
        }
    }
}
