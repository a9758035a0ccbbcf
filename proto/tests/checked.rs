//! Checked types: a round trip changes nothing, garbage is refused by name and never panics.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;

use farpage_proto::address::HostPort;
use farpage_proto::lease::{ExtentGrant, GrantRequest, LeaseRequest, ReleaseRequest, Renewal};
use farpage_proto::node::{ControlToken, NodeGrant, NodeRegistration, NodeRevoke};
use farpage_proto::report::AgentReport;
use farpage_proto::transport::EndpointUrl;
use farpage_proto::*;
use proptest::prelude::*;
use prost::Message;

fn name() -> impl Strategy<Value = String> {
    "[A-Za-z0-9._-]{1,63}"
}

fn host_port() -> impl Strategy<Value = HostPort> {
    let host = prop_oneof![
        "[a-z][a-z0-9.-]{0,60}",
        Just("::1".to_owned()),
        Just("10.0.0.7".to_owned())
    ];
    (host, 1u16..).prop_map(|(host, port)| HostPort { host, port })
}

fn data_address() -> impl Strategy<Value = DataAddress> {
    prop_oneof![
        "[@/][!-~]{1,100}".prop_map(DataAddress::Shm),
        host_port().prop_map(DataAddress::Tcp),
        host_port().prop_map(DataAddress::Rdma),
    ]
}

fn url() -> impl Strategy<Value = EndpointUrl> {
    prop_oneof![
        host_port().prop_map(EndpointUrl::Tcp),
        "/[!-~]{1,100}".prop_map(EndpointUrl::UnixPath),
        "[!-~]{1,100}".prop_map(EndpointUrl::UnixAbstract),
    ]
}

fn epoch() -> impl Strategy<Value = Epoch> {
    (1..u64::MAX / 2).prop_map(|n| Epoch::new(n).unwrap())
}

prop_compose! {
    fn registration()(
        id in name(),
        incarnation in 1u64..,
        extents in 1u64..2000,
        shift in 20u32..=28,
        labels in prop::collection::btree_map("[a-z/._-]{1,63}", "[ -~]{0,63}", 0..5),
        addresses in prop::collection::btree_set(data_address(), 1..5),
        control_url in url(),
        token in any::<[u8; 16]>(),
        last_epoch in 1u64..u64::MAX / 2,
        granted in prop::collection::vec(any::<(prop::sample::Index, prop::sample::Index)>(), 0..20),
    ) -> NodeRegistration {
        let granted: BTreeMap<u32, Epoch> = granted
            .into_iter()
            .map(|(index, epoch)| {
                let epoch = 1 + epoch.index(last_epoch.min(1 << 40) as usize) as u64;
                (index.index(extents as usize) as u32, Epoch::new(epoch).unwrap())
            })
            .collect();
        NodeRegistration {
            id: NodeId::new(id).unwrap(),
            incarnation: Incarnation::new(incarnation).unwrap(),
            capacity: ByteCount(extents << shift),
            extent_bytes: ByteCount::extent(1 << shift).unwrap(),
            labels,
            data_addresses: addresses.into_iter().collect(),
            control_url,
            control_token: ControlToken(token),
            last_epoch,
            granted: granted.into_iter().collect(),
        }
    }
}

/// Through the message, its bytes, and back.
fn round_trip<C, M>(checked: C) -> Result<C, C::Error>
where
    C: TryFrom<M>,
    M: From<C> + Message + Default,
{
    let bytes = M::from(checked).encode_to_vec();
    C::try_from(M::decode(bytes.as_slice()).unwrap())
}

proptest! {
    #[test]
    fn a_registration_survives_the_wire(node in registration()) {
        prop_assert_eq!(round_trip::<_, v1::RegisterNodeRequest>(node.clone()), Ok(node));
    }

    #[test]
    fn urls_and_addresses_survive_text(url in url(), address in data_address()) {
        prop_assert_eq!(url.to_string().parse::<EndpointUrl>(), Ok(url));
        prop_assert_eq!(address.to_string().parse::<DataAddress>(), Ok(address));
    }

    #[test]
    fn requests_survive_the_wire(
        agent in name(), host in "[a-z.]{1,100}", tenant in "[a-z]{0,10}",
        lease in 1u64.., count in 1u32..=64, copies in 1u32..=4, request in any::<u64>(), extents in prop::collection::vec(any::<u32>(), 0..50),
        index in 0u32..131_072, epoch in epoch(), key in 1u64.., address in data_address(), ttl in 1u64..100_000,
    ) {
        let open = LeaseRequest {
            agent: AgentId::new(agent.clone()).unwrap(),
            host: HostName::new(host).unwrap(),
            tenant: Tenant::new(tenant).unwrap(),
        };
        prop_assert_eq!(round_trip::<_, v1::OpenLeaseRequest>(open.clone()), Ok(open));
        let lease = LeaseId::new(lease).unwrap();
        let grant = GrantRequest {
            lease, count, copies, fabric: Some(FabricKind::Tcp), request: RequestId::new(request).ok(),
            extent_bytes: (copies > 1).then_some(ByteCount(1 << 24)), avoid: vec![NodeId::new(agent.clone()).unwrap()],
        };
        prop_assert_eq!(round_trip::<_, v1::GrantExtentsRequest>(grant.clone()), Ok(grant));
        let extents: Vec<_> = extents.into_iter().map(ExtentId).collect();
        let release = ReleaseRequest { lease, extents: extents.clone() };
        prop_assert_eq!(round_trip::<_, v1::ReleaseExtentsRequest>(release.clone()), Ok(release));
        let ttl = std::time::Duration::from_millis(ttl);
        let renewal = Renewal { ttl, lost: extents.clone(), unreachable: extents.clone(), draining: extents };
        prop_assert_eq!(round_trip::<_, v1::RenewLeaseResponse>(renewal.clone()), Ok(renewal));
        let key = AccessKey::new(key).unwrap();
        let node_grant = NodeGrant { index, epoch, key };
        prop_assert_eq!(round_trip::<_, v1::GrantExtentRequest>(node_grant), Ok(node_grant));
        let revoke = NodeRevoke { index, epoch };
        prop_assert_eq!(round_trip::<_, v1::RevokeExtentRequest>(revoke), Ok(revoke));
        let grant = ExtentGrant {
            extent: ExtentId(index), node: NodeId::new(agent).unwrap(), index, epoch, key, bytes: ByteCount(1 << 24), address, set: copies,
        };
        prop_assert_eq!(round_trip::<_, v1::ExtentGrant>(grant.clone()), Ok(grant));
    }

    #[test]
    fn arbitrary_text_never_panics_and_what_parses_prints_back(text in "\\PC{0,300}|[a-z:@/.\\[\\]0-9]{0,40}") {
        if let Ok(url) = text.parse::<EndpointUrl>() {
            prop_assert_eq!(url.to_string().parse::<EndpointUrl>(), Ok(url));
        }
        if let Ok(address) = text.parse::<DataAddress>() {
            prop_assert_eq!(address.to_string().parse::<DataAddress>(), Ok(address));
        }
        for error in [NodeId::new(&*text).err(), HostName::new(&*text).err(), Tenant::new(&*text).err()].into_iter().flatten() {
            prop_assert!(error.to_string().starts_with(error.field()));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let bytes = bytes.as_slice();
        if let Ok(m) = v1::RegisterNodeRequest::decode(bytes) { let _ = NodeRegistration::try_from(m); }
        if let Ok(m) = v1::OpenLeaseRequest::decode(bytes) { let _ = LeaseRequest::try_from(m); }
        if let Ok(m) = v1::GrantExtentsRequest::decode(bytes) { let _ = GrantRequest::try_from(m); }
        if let Ok(m) = v1::ReleaseExtentsRequest::decode(bytes) { let _ = ReleaseRequest::try_from(m); }
        if let Ok(m) = v1::RenewLeaseResponse::decode(bytes) { let _ = Renewal::try_from(m); }
        if let Ok(m) = v1::ExtentGrant::decode(bytes) { let _ = ExtentGrant::try_from(m); }
        if let Ok(m) = v1::GrantExtentRequest::decode(bytes) { let _ = NodeGrant::try_from(m); }
        if let Ok(m) = v1::RevokeExtentRequest::decode(bytes) { let _ = NodeRevoke::try_from(m); }
        if let Ok(m) = v1::AgentReport::decode(bytes) { let _ = AgentReport::try_from(m); }
    }

    #[test]
    fn registrations_with_arbitrary_fields_never_panic(
        node in registration(), capacity in any::<u64>(), extent_bytes in any::<u64>(), last_epoch in any::<u64>(),
        index in any::<u32>(), epoch in any::<u64>(), address in "\\PC{0,40}", token in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let good = v1::RegisterNodeRequest::from(node);
        let bad = [
            v1::RegisterNodeRequest { capacity_bytes: capacity, ..good.clone() },
            v1::RegisterNodeRequest { extent_bytes, ..good.clone() },
            v1::RegisterNodeRequest { capacity_bytes: capacity, extent_bytes, ..good.clone() },
            v1::RegisterNodeRequest { last_epoch, ..good.clone() },
            v1::RegisterNodeRequest { granted: vec![v1::GrantedExtent { index, epoch }], ..good.clone() },
            v1::RegisterNodeRequest { data_addresses: vec![address.clone()], ..good.clone() },
            v1::RegisterNodeRequest { control_url: address, ..good.clone() },
            v1::RegisterNodeRequest { control_token: token, ..good },
        ];
        for message in bad {
            if let Err(error) = NodeRegistration::try_from(message) {
                prop_assert!(error.to_string().starts_with(error.field()));
            }
        }
    }
}

#[test]
fn refusals_name_the_field() {
    let field =
        |message: v1::GrantExtentsRequest| GrantRequest::try_from(message).unwrap_err().field();
    assert_eq!(
        field(v1::GrantExtentsRequest {
            lease_id: 0,
            count: 1,
            ..Default::default()
        }),
        "lease_id"
    );
    assert_eq!(
        field(v1::GrantExtentsRequest {
            lease_id: 1,
            count: 0,
            ..Default::default()
        }),
        "count"
    );
    assert_eq!(
        field(v1::GrantExtentsRequest {
            lease_id: 1,
            count: 257,
            ..Default::default()
        }),
        "count"
    );
    let copies = |count, copies| v1::GrantExtentsRequest {
        lease_id: 1,
        count,
        copies,
        ..Default::default()
    };
    assert_eq!(field(copies(1, 5)), "copies");
    assert_eq!(field(copies(129, 2)), "count");
    assert_eq!(
        field(v1::GrantExtentsRequest {
            lease_id: 1,
            count: 1,
            fabric: 9,
            ..Default::default()
        }),
        "fabric"
    );
    let status = tonic::Status::from(NodeId::new("a b").unwrap_err());
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().starts_with("node_id: "), "{status:?}");
    assert_eq!(
        "https://h:1".parse::<EndpointUrl>().unwrap_err().field(),
        "url"
    );
}

#[test]
fn secrets_are_not_shown() {
    let text = format!(
        "{:?} {:?}",
        AccessKey::new(0xdead_beef).unwrap(),
        ControlToken([7; 16])
    );
    assert_eq!(text, "AccessKey(..) ControlToken(..)");
    assert!(ControlToken([7; 16]).matches(&[7; 16]));
    assert!(!ControlToken([7; 16]).matches(&[7; 15]));
}
